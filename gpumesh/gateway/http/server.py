"""``Server``: the HTTP server. It admits connections, counts them, and ends them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from gpumesh.event_loop.slice_queue import SliceQueue
from gpumesh.event_loop.turn_writes import TurnWrites
from gpumesh.gateway.http.admission import Admission, Admitted, Denied, normalize_address
from gpumesh.gateway.http.bodies.body_memory import BodyMemory
from gpumesh.gateway.http.bounds import Bounds, compute_max_connections
from gpumesh.gateway.http.connection import ClientConnection
from gpumesh.gateway.http.request import Handler
from gpumesh.gateway.http.responses import ErrorRenderer, plain_error

MAX_LINGERING = 64  # refused connections that may linger, so that their clients see the refusal


class Server:
    """Makes a ``ClientConnection`` for each client. All of them use one handler. Use it as the factory of protocols in
    ``loop.create_server(server, …)``.

    ``render_error`` makes the answers to input that is no request. ``clock`` returns seconds. ``refused_connections``
    counts the connections that were not admitted, ``evicted_connections`` the idle connections that were closed to
    make room.
    """

    def __init__(
        self,
        handler: Handler,
        bounds: Bounds,
        *,
        render_error: ErrorRenderer = plain_error,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.handler = handler
        self.bounds = bounds
        self.render_error = render_error
        self.clock = clock
        self.memory = BodyMemory(bounds.total_body_bytes, patience_s=bounds.body_timeout_s, clock=clock)
        self.slices = SliceQueue()
        self.turn_writes = TurnWrites()
        self.refused_connections = 0
        self.evicted_connections = 0
        self.admission: Admission[ClientConnection] = Admission(
            compute_max_connections() if bounds.max_connections is None else bounds.max_connections
        )
        self._connections: set[ClientConnection] = set()  # admitted connections, also those that are about to end
        self._lingering: set[ClientConnection] = set()  # refused connections
        self._closing = False  # no connection is admitted any more

    def __repr__(self) -> str:
        state = "closing" if self._closing else "serving"
        return f"<Server {state}, {self.connection_count} of {self.admission.max_connections} connections>"

    def __call__(self) -> ClientConnection:
        """Makes the connection of a new client."""
        return ClientConnection(self, asyncio.get_running_loop())

    @property
    def connection_count(self) -> int:
        """The number of the connections that are admitted now."""
        return self.admission.count

    def admit(self, connection: ClientConnection) -> str | None:
        """Returns the reason why the connection must be refused, or ``None`` if it may stay."""
        if self._closing:
            refusal_reason: str | None = "the gateway is stopping"
        else:
            address = normalize_address(connection.client_address)
            refusal_reason = self._apply(self.admission.admit(connection, address))
        if refusal_reason is None:
            self._connections.add(connection)
        else:
            self.refused_connections += 1
        return refusal_reason

    def register_key(self, connection: ClientConnection, key: str | None) -> str | None:
        """Accepts a request with this key (``None``: the gateway asks for no key). Returns the reason why the request
        must be refused, or ``None``."""
        return self._apply(self.admission.register_key(connection, key))

    def _apply(self, decision: Admitted[ClientConnection] | Denied) -> str | None:
        """Closes the evicted connection, if there is one. Returns the reason of a denial, or ``None``."""
        if isinstance(decision, Denied):
            return decision.reason
        if decision.evicted is not None:
            self.evicted_connections += 1
            decision.evicted.evict()
        return None

    def may_linger(self, connection: ClientConnection) -> bool:
        """Whether a connection that was not admitted may stay until its client has seen the refusal."""
        if len(self._lingering) >= MAX_LINGERING:
            return False
        self._lingering.add(connection)
        return True

    def forget(self, connection: ClientConnection) -> None:
        """Removes a connection that is gone."""
        self.admission.forget(connection)
        self._connections.discard(connection)
        self._lingering.discard(connection)

    def close_idle(self) -> None:
        """Takes no more requests: idle connections end now, busy ones after their answers."""
        self._closing = True
        for connection in list(self._connections):
            connection.close_when_idle()

    async def close(self, linger_s: float | None = None) -> None:
        """Ends all connections. Answers that are on their way have ``linger_s`` to arrive; ``None``: as long as
        ``Bounds.linger_s``."""
        self.close_idle()
        sending_connections = [connection for connection in self._connections if connection.writer.unsent_bytes]
        other_connections = (self._connections | self._lingering).difference(sending_connections)
        tasks = [connection.cancel() for connection in other_connections]  # the tasks that are now ending, or ``None``
        with suppress(TimeoutError):
            async with asyncio.timeout(self.bounds.linger_s if linger_s is None else linger_s):
                await asyncio.gather(*(connection.wait_closed() for connection in sending_connections))
        tasks += [connection.cancel() for connection in sending_connections]
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the next turn of the event loop
