"""The ports at which a simulated host listens for a client of its SSH server (remote port forwarding, ``ssh -R``).

Like all ports of a simulated host they are names: each has a real port on loopback, in ``SimSshServer.ports``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any, Protocol

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


class ReverseConnection(Protocol):
    """The part of ``ssh.Connection`` that is used here."""

    def post(self, callback: Callable[..., object], *arguments: Any) -> None: ...

    def connect_to_client(self, port: int, sock: socket.socket, peer: tuple[str, int]) -> None: ...


class ReversePorts:
    """The ports of one SSH connection. ``ports`` is ``SimSshServer.ports``."""

    def __init__(self, ports: dict[int, int], connection: ReverseConnection) -> None:
        self._ports = ports
        self._connection = connection
        self._listeners: dict[int, socket.socket] = {}  # by the host's port
        self._closed = False

    # -- called by paramiko's thread ---------------------------------------------------------------------------------

    def add(self, port: int) -> bool:
        """Listens for the client. Returns false if the port is not free."""
        if self._closed or port == 0 or port in self._ports:
            return False
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setblocking(False)
        self._listeners[port] = listener
        self._ports[port] = listener.getsockname()[1]
        self._connection.post(self._watch, port, listener)
        return True

    def remove(self, port: int) -> None:
        self._connection.post(self._remove, port)

    # -- on the event loop -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all ports."""
        self._closed = True
        for port in list(self._listeners):
            self._remove(port)

    def _watch(self, port: int, listener: socket.socket) -> None:
        if self._closed:  # meanwhile
            self._remove(port)
        elif self._listeners.get(port) is listener:  # otherwise it has been removed already
            asyncio.get_running_loop().add_reader(listener, self._accept, port, listener)

    def _accept(self, port: int, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # the program has gone again
            sock, peer = listener.accept()
            self._connection.connect_to_client(port, sock, peer)

    def _remove(self, port: int) -> None:
        listener = self._listeners.pop(port, None)
        if listener is not None:
            self._ports.pop(port, None)
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
