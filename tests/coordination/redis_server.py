"""Gateways that share places over a real redis-server (``tests/redis_server.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

from gpumesh.balancer.base import Priority
from gpumesh.coordination.base import PlaceRequest
from gpumesh.coordination.several_gateways import SeveralGateways
from gpumesh.coordination.timing import Timing
from tests.redis_server import RedisServer as RedisServer
from tests.redis_server import free_port as free_port
from tests.redis_server import redis_server as redis_server
from tests.tunnels.polling import wait_until

# A tenth of the usual times, but a time-out that a busy machine keeps.
SHORT = Timing(
    heartbeat_s=0.1,
    dead_s=0.7,
    own_s=0.5,
    share_s=1.0,
    answer_s=0.3,
    connect_s=0.5,
    owner_s=0.3,
    forget_s=6.0,
    first_pause_s=0.05,
    max_pause_s=0.2,
)
KEY = "GPU-1"


def request(
    limit: int | None = 1,
    *,
    priority: Priority = Priority.NORMAL,
    client: str = "ann",
    waited_s: float = 0.0,
    cost: float = 10.0,
) -> PlaceRequest:
    return PlaceRequest(limit, priority, client, waited_s, cost)


@dataclass
class Gateway:
    """A gateway of a test. ``waiting`` are requests that it places in ``on_change``, the first one first. ``slept_s``:
    for so long its machine has slept."""

    places: SeveralGateways = field(init=False)
    waiting: list[PlaceRequest] = field(default_factory=list)
    placed: list[PlaceRequest] = field(default_factory=list)
    held: int = 0
    most_held: int = 0
    slept_s: float = 0.0
    changes: list[Collection[str]] = field(default_factory=list)

    def on_change(self, keys: Collection[str]) -> None:
        self.changes.append(keys)
        self.place_waiting()
        self.announce()

    def place_waiting(self) -> None:
        while self.waiting and self.has_room(self.waiting[0].limit) and self.places.take_now(KEY):
            self.count(self.waiting[0])
            self.placed.append(self.waiting.pop(0))

    def has_room(self, limit: int | None) -> bool:
        return limit is None or self.held + self.places.others_in_flight(KEY, self.held, limit) < limit

    def count(self, taken: PlaceRequest) -> None:
        self.held += 1
        self.most_held = max(self.most_held, self.held)

    async def take(self, wanted: PlaceRequest | None = None) -> bool:
        wanted = wanted or request()
        answer = self.places.take_now(KEY)
        if answer is None:
            answer = await self.places.take(KEY, wanted)
        if answer:
            self.count(wanted)
        return answer

    def wait(self, *wanted: PlaceRequest) -> None:
        """Lets requests wait for a place."""
        self.waiting += wanted
        self.announce()

    def announce(self) -> None:
        best: dict[Priority, PlaceRequest] = {}
        for waiting in self.waiting:
            best.setdefault(waiting.priority, waiting)
        self.places.announce(KEY, list(best.values()))

    def release(self, cost_correction: float = 0.0) -> None:
        self.held -= 1
        self.places.release(KEY, Priority.NORMAL, "ann", cost_correction)

    @property
    def is_joined(self) -> bool:
        return self.places._places.state == "joined"

    @property
    def problem(self) -> str:
        return self.places.problem or ""


@asynccontextmanager
async def gateway(
    url: str,
    *,
    timing: Timing = SHORT,
    password: Callable[[], str | None] = lambda: None,
    ca_file: str | None = None,
    mesh: str = "mesh",
    joins: bool = True,
) -> AsyncIterator[Gateway]:
    """A gateway that runs. ``joins``: returns when it shares places."""
    running = Gateway()
    running.places = SeveralGateways(
        url,
        mesh=mesh,
        password=password,
        on_change=running.on_change,
        clock=monotonic,
        ca_file=ca_file,
        timing=timing,
        slept=lambda: running.slept_s,
    )
    task = asyncio.create_task(running.places.run())
    try:
        if joins:
            await wait_until(lambda: running.is_joined or task.done(), "the gateway has joined")
        yield running
        assert not task.done(), "the gateway has ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
