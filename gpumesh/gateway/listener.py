"""The addresses on which the gateway listens: a TCP address, a Unix socket, or both."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning
from gpumesh.tunnels.local_system.unix_sockets import PathInUse, UnixListener

BACKLOG = 1024  # connections that the system holds until they are accepted


class HttpListener:
    """Listens for clients on ``host`` and ``port``, on a Unix socket at ``path``, or on both. ``open`` may be called
    once. ``url`` is the TCP address, with the port that the system chose for port 0; without TCP, the Unix socket."""

    def __init__(self, host: str | None, port: int, path: Path | None) -> None:
        self._host = host
        self._port = port
        self._path = path
        self._unix: UnixListener | None = None
        self._servers: list[asyncio.Server] = []
        self.url = ""

    def __repr__(self) -> str:
        return f"<HttpListener {self.url or 'not open'}>"

    async def open(self, create_connection: Callable[[], asyncio.Protocol]) -> None:
        """Starts to listen. ``create_connection`` makes the protocol of each client's connection. Raises
        MeshAlreadyRunning if an address is taken, and GPUMeshError for another fault of the socket's path."""
        loop = asyncio.get_running_loop()
        try:
            if self._host is not None:
                listener = self._listen_tcp(self._host)
                host = f"[{self._host}]" if ":" in self._host else self._host
                _, port, *_ = listener.getsockname()  # another port than ``_port`` if that is 0
                self.url = f"http://{host}:{port}"
                self._servers.append(await loop.create_server(create_connection, sock=listener, backlog=BACKLOG))
            if self._path is not None:
                self._unix = _listen_unix(self._path)
                self.url = self.url or f"{UNIX_PREFIX}{self._path}"
                self._servers.append(
                    await loop.create_unix_server(create_connection, sock=self._unix.sock, backlog=BACKLOG)
                )
        except BaseException:  # the second address failed, or we were cancelled: the first must not stay open
            self.close()
            raise

    @property
    def unix_socket(self) -> str | None:
        """The path of the Unix socket, if there is one."""
        return None if self._path is None else str(self._path)

    def close(self) -> None:
        """Accepts no more clients. The connections that were accepted stay."""
        if self._unix is not None:
            self._unix.remove_path()  # before the socket is closed: until then no other process can take over the path
        for server in self._servers:
            server.close()
        if self._unix is not None:
            self._unix.close()

    def _listen_tcp(self, host: str) -> socket.socket:
        """A socket that is bound to the address. Raises MeshAlreadyRunning if it cannot be bound."""
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        # 1: on. After a restart the address is free at once, although old connections are still in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, self._port))
        except OSError as error:
            listener.close()
            raise MeshAlreadyRunning(
                f"the gateway cannot listen on {host}:{self._port}: {error.strerror}",
                hint="another program (or another mesh) has that port; `--listen 127.0.0.1:0` takes any free one",
            ) from error
        return listener


def _listen_unix(path: Path) -> UnixListener:
    """A Unix socket that listens at ``path``. Raises MeshAlreadyRunning if another process has the path, and
    GPUMeshError if no socket can be made there."""
    try:
        return UnixListener(path, BACKLOG)
    except PathInUse as error:
        raise MeshAlreadyRunning(
            f"the gateway cannot listen on {UNIX_PREFIX}{path}: {error.message}", hint=error.hint
        ) from error
    except OSError as error:
        raise GPUMeshError(
            f"the gateway cannot listen on {UNIX_PREFIX}{path}: {error.strerror}",
            hint="name a path in a folder that exists and that you can write to",
        ) from error
