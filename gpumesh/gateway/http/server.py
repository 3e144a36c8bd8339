"""The gateway's HTTP server: its connections, how many there may be, and how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from gpumesh.gateway.http.admission import Admission, Admitted, Refused, address_of
from gpumesh.gateway.http.body_memory import BodyMemory, LongWork
from gpumesh.gateway.http.bounds import Bounds, connections_allowed
from gpumesh.gateway.http.connection import Connection
from gpumesh.gateway.http.exchange import Handler
from gpumesh.gateway.observe.record import Record
from gpumesh.mesh.requests.slice_queue import SliceQueue

AWAY = 64  # connections past the bound that may linger, so that their refusal is seen


class Server:
    """Makes a ``Connection`` for each client (``loop.create_server(server, …)``), all for one handler.

    ``turned_away`` counts those past the bound, ``made_room`` the idle ones that were closed for others.
    """

    def __init__(self, handler: Handler, bounds: Bounds, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.handler = handler
        self.bounds = bounds
        self.memory = BodyMemory(bounds.bodies_bytes, patience_s=bounds.body_s, clock=clock)
        self.long_work = LongWork()
        self.turned_away = 0
        self.slices = SliceQueue()
        self._clock = clock
        self.made_room = 0
        self.admission: Admission[Connection] = Admission(
            connections_allowed() if bounds.connections is None else bounds.connections
        )
        self._connections: set[Connection] = set()  # with those that are about to end
        self._away: set[Connection] = set()
        self._closing = False

    def __call__(self) -> Connection:
        return Connection(self, asyncio.get_running_loop())

    @property
    def connections(self) -> int:
        return self.admission.count

    def record(self, method: str) -> Record:
        return Record(self._clock, self._clock(), method, "")

    def admit(self, connection: Connection) -> str | None:
        """Why it must go, or ``None``."""
        reason: str | None = "the gateway is stopping"
        if not self._closing:
            reason = self._made_room(self.admission.admit(connection, address_of(connection.remote)))
        if reason is None:
            self._connections.add(connection)
        else:
            self.turned_away += 1
        return reason

    def accept(self, connection: Connection, key: str | None) -> str | None:
        """A request of it is accepted, with this key (``None``: none is asked for); or why it must be refused."""
        return self._made_room(self.admission.show_key(connection, key))

    def _made_room(self, decision: Admitted[Connection] | Refused) -> str | None:
        if isinstance(decision, Refused):
            return decision.reason
        if decision.instead_of is not None:
            self.made_room += 1
            decision.instead_of.make_room()
        return None

    def may_linger(self, connection: Connection) -> bool:
        """Whether one that was turned away may stay until its refusal is seen."""
        if len(self._away) >= AWAY:
            return False
        self._away.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        self.admission.forget(connection)
        self._connections.discard(connection)
        self._away.discard(connection)

    def close_idle(self) -> None:
        """No more requests: idle connections end now, the others after their answers."""
        self._closing = True
        for connection in list(self._connections):
            connection.close_when_idle()

    async def close(self, linger_s: float | None = None) -> None:
        """Ends whatever is left; answers that are on their way have ``linger_s`` to arrive, else that of the bounds."""
        self.close_idle()
        leaving = [connection for connection in self._connections if connection.unsent]
        tasks = [connection.cancel() for connection in (self._connections | self._away).difference(leaving)]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.bounds.linger_s if linger_s is None else linger_s):
                await asyncio.gather(*(connection.ended() for connection in leaving))
        tasks += [connection.cancel() for connection in leaving]
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next round
