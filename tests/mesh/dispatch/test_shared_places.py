"""Requests on nodes that other gateways use too: which places they take, what is announced, and what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.coordination.base import PlaceRequest
from gpumesh.coordination.single_gateway import SingleGateway
from tests.mesh.dispatch.desk import DEMAND, Desk, open_desk
from tests.mesh.meshes import MODEL
from tests.tunnels.polling import wait_until

URGENT = Demand(model=MODEL, priority=Priority.INTERACTIVE, client="ann")
BATCH = Demand(model=MODEL, priority=Priority.BATCH, client="bob")


class Neighbours(SingleGateway):
    """Other gateways that hold ``held`` places of each key and leave the rest to this one. ``granted`` places wait for
    ``take_now``. ``asked``, ``announced`` and ``given_back`` are what this gateway has told them."""

    def __init__(self, held: int = 0) -> None:
        super().__init__()
        self.held = held
        self.known_held = 0  # as far as this gateway knows
        self.own = self.granted = 0
        self.answers = asyncio.Event()  # they answer only while it is set
        self.answers.set()
        self.asked: list[PlaceRequest] = []
        self.announced: dict[str, Sequence[PlaceRequest]] = {}
        self.given_back: list[tuple[Priority, str, float]] = []
        self.keys: set[str] = set()

    def hold(self, key: str) -> None:
        self.keys.add(key)
        self.own += 1

    def take_now(self, key: str) -> bool | None:
        self.keys.add(key)
        if not self.granted:
            return None
        self.granted -= 1
        self.own += 1
        return True

    async def take(self, key: str, request: PlaceRequest) -> bool:
        self.keys.add(key)
        self.asked.append(request)
        await self.answers.wait()
        self.known_held = self.held
        if request.limit is not None and self.held + self.own >= request.limit:
            return False
        self.own += 1
        return True

    def release(self, key: str, priority: Priority, client: str, cost_correction: float = 0.0) -> None:
        assert key in self.keys, "a place that was not taken"
        self.own -= 1
        self.given_back.append((priority, client, cost_correction))

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:
        return self.known_held

    def announce(self, key: str, heads: Sequence[PlaceRequest]) -> None:
        self.announced[key] = heads

    def shared_keys(self) -> Collection[str]:
        return self.keys

    def give(self, desk: Desk) -> None:
        """Another gateway gives back a place, and it goes to this one."""
        self.held -= 1
        self.known_held, self.granted = self.held, 1
        desk.dispatcher.note_places_changed(list(self.keys))

    def heads(self) -> list[PlaceRequest]:
        """What is announced for the only key."""
        (heads,) = self.announced.values()
        return list(heads)


async def test_a_place_that_others_have_taken_is_denied_and_the_request_waits_with_its_old_place() -> None:
    neighbours = Neighbours(held=2)
    async with open_desk("a", max_parallel=2, neighbours=neighbours) as desk:
        waits = await desk.queue(URGENT)
        assert [request.limit for request in neighbours.asked] == [2]
        assert desk.in_flight() == 0, "the denied lease was given back"
        desk.now += 3.0
        later = await desk.queue(URGENT)
        await wait_until(lambda: bool(neighbours.announced), "it is announced")
        assert [(head.priority, head.limit) for head in neighbours.heads()] == [(Priority.INTERACTIVE, 2)]
        neighbours.give(desk)
        assert not neighbours.granted, "the place is used before the call returns"
        (await waits).release(Outcome.SERVED)
        assert not later.done()
        neighbours.give(desk)
        assert neighbours.heads() == [], "nobody waits any more, and this is told before the call returns"
        (await later).release(Outcome.SERVED)
        assert neighbours.own == 0


async def test_another_node_is_tried_before_the_request_waits() -> None:
    neighbours = Neighbours(held=1)
    async with open_desk("a", "b", max_parallel=1, neighbours=neighbours) as desk:
        desk.fleet["a"].account.max_parallel = 2  # more than the other gateways leave there
        lease = await desk.acquire()
        assert lease.node.name == "a"
        assert {request.limit for request in neighbours.asked} <= {1, 2}
        lease.release(Outcome.SERVED)


async def test_the_best_request_of_each_class_is_announced_and_only_when_it_changes() -> None:
    neighbours = Neighbours(held=1)
    async with open_desk("a", max_parallel=1, neighbours=neighbours) as desk:
        batch = await desk.queue(BATCH)
        await wait_until(lambda: bool(neighbours.announced), "it is announced")
        desk.now += 5.0
        urgent = await desk.queue(URGENT)
        another = await desk.queue(BATCH)
        await wait_until(lambda: len(neighbours.heads()) == 2, "both classes are announced")
        assert [(head.priority, head.client) for head in neighbours.heads()] == [
            (Priority.INTERACTIVE, "ann"),
            (Priority.BATCH, "bob"),
        ]
        assert [head.cost > 0 for head in neighbours.heads()] == [True, True]
        neighbours.announced.clear()
        desk.dispatcher.grant_waiting()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not neighbours.announced, "nothing has changed"
        for task in (batch, urgent, another):
            task.cancel()
        await asyncio.gather(batch, urgent, another, return_exceptions=True)
        await wait_until(lambda: bool(neighbours.announced), "it is told that nobody waits")
        assert neighbours.heads() == []


async def test_a_place_goes_back_under_the_key_under_which_it_was_taken() -> None:
    neighbours = Neighbours()
    async with open_desk("a", neighbours=neighbours) as desk:
        lease = await desk.acquire()
        (taken,) = neighbours.keys
        desk.fleet["a"]._snapshots._coordination_key = "GPU-1"  # as after the first look at the GPUs
        lease.release(Outcome.SERVED)
        assert neighbours.keys == {taken}
        assert neighbours.own == 0


async def test_a_running_request_keeps_its_place_when_the_gpus_of_its_node_become_known() -> None:
    neighbours = Neighbours()
    async with open_desk("a", neighbours=neighbours) as desk:
        lease = await desk.acquire(BATCH)
        desk.fleet["a"]._snapshots._coordination_key = "GPU-1"
        desk.dispatcher.note_nodes_changed()
        assert "GPU-1" in neighbours.keys
        assert neighbours.own == 1, "one place was given back, and one more is held"
        assert neighbours.given_back == [(Priority.BATCH, "bob", 0.0)]
        desk.dispatcher.note_nodes_changed()
        assert len(neighbours.given_back) == 1
        lease.release(Outcome.SERVED)
        assert neighbours.own == 0


@pytest.mark.parametrize(
    ("outcome", "counters", "expected"),
    [
        (Outcome.SERVED, ServerCounters(prompt_tokens=10, tokens=50), "the true cost"),
        (Outcome.SERVED, None, "none"),
        (Outcome.UNREACHABLE, None, "all of it"),
    ],
)
async def test_the_cost_is_corrected_when_a_place_goes_back(
    outcome: Outcome, counters: ServerCounters | None, expected: str
) -> None:
    neighbours = Neighbours()
    async with open_desk("a", neighbours=neighbours) as desk:
        lease = await desk.acquire(BATCH)
        cost = neighbours.asked[0].cost
        lease.release(outcome, counters=counters, error="why")
        corrections = {"the true cost": 10 + 2 * 50 - cost, "none": 0.0, "all of it": -cost}
        ((priority, client, correction),) = neighbours.given_back
        assert (priority, client) == (Priority.BATCH, "bob")
        assert correction == pytest.approx(corrections[expected])


async def test_a_client_that_goes_while_the_others_are_asked_leaves_nothing() -> None:
    neighbours = Neighbours()
    async with open_desk("a", neighbours=neighbours) as desk:
        neighbours.answers.clear()
        asks = asyncio.create_task(desk.acquire())
        await wait_until(lambda: bool(neighbours.asked), "they are asked")
        assert desk.in_flight() == 1
        asks.cancel()
        await asyncio.gather(asks, return_exceptions=True)
        assert desk.in_flight() == 0
        assert neighbours.given_back == [], "there was no place yet"


async def test_an_unused_lease_gives_its_place_back() -> None:
    neighbours = Neighbours()
    async with open_desk("a", neighbours=neighbours) as desk:
        lease = await desk.acquire(BATCH)
        lease.discard()
        assert neighbours.own == 0
        assert neighbours.given_back == [(Priority.BATCH, "bob", -neighbours.asked[0].cost)]


async def test_nothing_is_announced_for_a_node_that_takes_no_requests() -> None:
    neighbours = Neighbours(held=1)
    async with open_desk("a", max_parallel=1, neighbours=neighbours) as desk:
        waits = await desk.queue(DEMAND)
        await wait_until(lambda: bool(neighbours.announced), "it is announced")
        desk.fleet["a"].role.drained = True
        desk.fleet["a"].announce_change()
        await wait_until(lambda: neighbours.heads() == [], "it is withdrawn")
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
