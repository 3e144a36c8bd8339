"""Connects to a port of this machine for a reverse forward, in the selector's thread (forwarder.py)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from gpumesh.tunnels.forwarder import WRITE, Forwarder
from gpumesh.tunnels.local_system.sockets import disable_nagle

CONNECT_TIMEOUT_S = 10.0  # a program whose listen queue is full takes no connection, and sends no refusal


class LocalConnect:
    """One attempt to connect to 127.0.0.1:``port``; a ``forwarder.Relay`` until its end.

    ``on_end`` is called once, in the selector's thread, perhaps before the constructor returns: with the connected
    socket, or with ``None`` when there is no connection.
    """

    def __init__(self, forwarder: Forwarder, port: int, on_end: Callable[[socket.socket | None], None]) -> None:
        """Raises OSError when no socket is left; then ``on_end`` is not called."""
        self._forwarder = forwarder
        self._on_end = on_end
        self._ended = False
        self._socket = socket.socket()
        self._socket.setblocking(False)
        forwarder.add_relay(self)
        status = self._socket.connect_ex(("127.0.0.1", port))
        if status == errno.EINPROGRESS:
            forwarder.watch(self._socket, WRITE, self._on_ready)
            forwarder.call_later(CONNECT_TIMEOUT_S, self.abort)
        else:
            self._finish(status)

    def abort(self) -> None:
        self._finish(errno.ECONNABORTED)

    def _on_ready(self, _: int) -> None:
        self._finish(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _finish(self, status: int) -> None:
        """Ends the attempt with the status of ``connect``: 0, or an error's number. A second call changes nothing."""
        if self._ended:
            return
        self._ended = True
        self._forwarder.watch(self._socket, 0, self._on_ready)  # 0 ends the watch
        self._forwarder.discard_relay(self)
        if status == 0:
            try:
                disable_nagle(self._socket)
                # TCP may connect a socket with itself, if nothing listens at a port that the system also gives out.
                if self._socket.getsockname() != self._socket.getpeername():
                    self._on_end(self._socket)
                    return
            except OSError:  # the peer has reset the connection already
                pass
        self._socket.close()
        self._on_end(None)
