"""A request may leave a free slot free and wait for a better node (``adaptive``), but not for ever."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import QueueFull
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.topology import PolicyKind
from tests.mesh.dispatch.desk import Desk, open_desk
from tests.mesh.meshes import MODEL
from tests.mesh.nodes.build import make_scheduler


@asynccontextmanager
async def open_desk_with_a_better_node(**more: Any) -> AsyncIterator[tuple[Desk, Lease]]:
    """Node ``a`` has the model in memory and is busy with the lease; ``b`` is free, and needs 2 minutes to load it."""
    async with open_desk("a", "b", policy=PolicyKind.ADAPTIVE, cold=frozenset({"b"}), **more) as desk:
        desk.fleet["b"].account.rates.learn(MODEL, load_s=120.0)
        yield desk, await desk.acquire(Demand(model=MODEL, node="a"))


async def test_a_request_may_wait_for_a_better_node_although_another_is_free() -> None:
    async with open_desk_with_a_better_node() as (desk, holder):
        waits = await desk.queue()
        holder.release(Outcome.SERVED)
        lease = await waits
        assert lease.node.name == "a"
        lease.release(Outcome.SERVED)


async def test_a_request_does_not_wait_for_ever_for_a_better_node() -> None:
    async with open_desk_with_a_better_node() as (desk, holder):
        waits = await desk.queue()
        desk.now += 200.0
        desk.dispatcher.grant_waiting()
        lease = await waits
        assert lease.node.name == "b"
        for granted in (lease, holder):
            granted.release(Outcome.SERVED)


async def test_a_request_that_may_not_wait_takes_the_free_slot() -> None:
    async with open_desk_with_a_better_node(max_queue=0) as (desk, holder):
        lease = await desk.acquire()
        assert lease.node.name == "b"
        with pytest.raises(QueueFull):
            await desk.acquire()
        for granted in (lease, holder):
            granted.release(Outcome.SERVED)


async def test_a_request_for_an_endless_answer_is_ranked_like_others() -> None:
    async with open_desk("a", "b", policy=PolicyKind.ADAPTIVE) as desk:
        lease = await desk.acquire(Demand(model=MODEL, max_tokens=10**400))
        lease.release(Outcome.SERVED)
        assert desk.in_flight() == 0


def test_a_model_that_was_just_loaded_stays_while_it_is_used_but_an_idle_node_loads_another_at_once() -> None:
    scheduler = make_scheduler(PolicyKind.ADAPTIVE)
    account = scheduler.roster.add("one", max_parallel=4)
    account.is_up = True
    first = scheduler.place_now(Demand(model="big"), 0.0)
    assert first is not None
    scheduler.note_first_token(first.placed, 6.0)
    assert scheduler.place_now(Demand(model="small"), 7.0) is None
    scheduler.end(first.placed, 8.0)
    other = scheduler.place_now(Demand(model="small"), 8.0)
    assert other is not None
    assert list(other.forecast.pushed_out) == ["big:latest"]
