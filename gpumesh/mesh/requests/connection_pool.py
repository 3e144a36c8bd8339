"""The connections to all backends. Idle connections are kept for KEEPALIVE_S, to be used again."""

from __future__ import annotations

import asyncio
import ssl
from functools import cache
from typing import Any

from gpumesh.mesh.requests.upstream_connection import Address, UpstreamConnection
from gpumesh.slice_queue import SliceQueue
from gpumesh.turn_end import TurnEnd

CONNECT_TIMEOUT_S = 3.0
KEEPALIVE_S = 30.0


class ConnectionPool:
    """Idle connections by address. The connection that was used last is taken first: the server is the least likely to
    close it just now."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.slices = SliceQueue()
        self._turn_end = TurnEnd()
        self._loop = loop
        self._idle: dict[Address, list[UpstreamConnection]] = {}
        self._connections: set[UpstreamConnection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        idle = sum(len(connections) for connections in self._idle.values())
        return f"<ConnectionPool {len(self._connections)} connections, {idle} idle>"

    def take_idle(self, address: Address) -> UpstreamConnection | None:
        """Removes an idle connection from the pool and returns it; ``None`` if there is none."""
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.open:
                return connection
        return None

    async def connect(self, address: Address) -> UpstreamConnection:
        """A new connection. Raises OSError and TimeoutError."""
        loop = self._loop
        tls: dict[str, Any] = {
            "ssl": _tls_context() if address.tls else None,
            "server_hostname": (address.server_name or address.host) if address.tls else None,
        }

        def create_connection() -> UpstreamConnection:
            return UpstreamConnection(
                address, self.slices, self._turn_end, on_idle=self._keep_idle, on_closed=self._forget
            )

        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if address.socket is not None:
                _, connection = await loop.create_unix_connection(create_connection, address.socket, **tls)
            else:
                _, connection = await loop.create_connection(create_connection, address.host, address.port, **tls)
        self._connections.add(connection)
        return connection

    def _keep_idle(self, connection: UpstreamConnection) -> None:
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.address, []).append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(KEEPALIVE_S, self._close_expired)

    def _forget(self, connection: UpstreamConnection) -> None:
        self._connections.discard(connection)
        idle = self._idle.get(connection.address, [])
        if connection in idle:
            idle.remove(connection)

    def _close_expired(self) -> None:
        expired_before = self._loop.time() - KEEPALIVE_S
        idle = [connection for connections in self._idle.values() for connection in connections]
        for connection in idle:
            if connection.idle_since <= expired_before:
                connection.abort()
        self._timer = self._loop.call_later(KEEPALIVE_S, self._close_expired) if any(self._idle.values()) else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._connections):
            connection.abort()


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()
