"""``ConnectionPool``: the connections to all backends. Idle connections stay open for a while, to be used again."""

from __future__ import annotations

import asyncio
import ssl
from functools import cache
from typing import Any

from gpumesh.event_loop.slice_queue import SliceQueue
from gpumesh.event_loop.turn_writes import TurnWrites
from gpumesh.mesh.requests.connections.upstream_connection import Address, UpstreamConnection

CONNECT_TIMEOUT_S = 3.0
KEEPALIVE_S = 30.0  # an idle connection is closed after this time, or at the latest after twice this time


class ConnectionPool:
    """Makes connections, and keeps idle connections by address. The connection that was used last is used again first:
    it is the least likely to be closed by its server at this moment."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.slices = SliceQueue()
        self._turn_writes = TurnWrites()
        self._loop = loop
        self._idle: dict[Address, list[UpstreamConnection]] = {}
        self._connections: set[UpstreamConnection] = set()
        self._timer: asyncio.TimerHandle | None = None  # runs until the idle connections are checked

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
        """Opens a new connection. Raises OSError, and TimeoutError after CONNECT_TIMEOUT_S."""
        loop = self._loop
        tls_arguments: dict[str, Any] = {
            "ssl": _tls_context() if address.tls else None,
            "server_hostname": (address.server_name or address.host) if address.tls else None,
        }

        def create_connection() -> UpstreamConnection:
            """The factory of protocols for the event loop."""
            return UpstreamConnection(
                address, self.slices, self._turn_writes, on_idle=self._keep_idle, on_closed=self._forget
            )

        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if address.socket is not None:
                _, connection = await loop.create_unix_connection(create_connection, address.socket, **tls_arguments)
            else:
                _, connection = await loop.create_connection(
                    create_connection, address.host, address.port, **tls_arguments
                )
        self._connections.add(connection)
        return connection

    def _keep_idle(self, connection: UpstreamConnection) -> None:
        """Puts a connection whose response is complete into the pool."""
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.address, []).append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(KEEPALIVE_S, self._close_expired)

    def _forget(self, connection: UpstreamConnection) -> None:
        """Removes a connection that is gone."""
        self._connections.discard(connection)
        idle = self._idle.get(connection.address, [])
        if connection in idle:
            idle.remove(connection)

    def _close_expired(self) -> None:
        """Closes the connections that were idle for KEEPALIVE_S. Runs every KEEPALIVE_S while any are idle."""
        expired_before = self._loop.time() - KEEPALIVE_S
        idle = [connection for connections in self._idle.values() for connection in connections]
        for connection in idle:
            if connection.idle_since <= expired_before:
                connection.abort()
        self._timer = self._loop.call_later(KEEPALIVE_S, self._close_expired) if any(self._idle.values()) else None

    def close(self) -> None:
        """Closes all connections."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._connections):
            connection.abort()


@cache
def _tls_context() -> ssl.SSLContext:
    """The settings of all TLS connections. They are cached, because to load the system's certificates takes long."""
    return ssl.create_default_context()
