"""Each slot is given once and returned once; which slots count."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.topology import PolicyKind
from tests.mesh.dispatch.desk import open_desk, release_in_turn
from tests.mesh.meshes import MODEL


async def test_a_free_slot_is_given_at_once_and_each_node_gets_its_share() -> None:
    async with open_desk("a", "b") as desk:
        leases = [await desk.acquire(), await desk.acquire()]
        assert {lease.node.name for lease in leases} == {"a", "b"}
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_a_cancelled_request_leaves_the_queue_at_once() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        leaves, stays = await desk.queue(), await desk.queue()
        leaves.cancel()
        await asyncio.wait([leaves])
        assert desk.dispatcher.queued == 1
        assert await release_in_turn(desk, [("stays", stays)], holder) == ["stays"]


async def test_a_request_cancelled_in_the_moment_of_its_grant_gives_the_slot_back() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        leaves, next_request = await desk.queue(), await desk.queue()
        holder.release(Outcome.SERVED)  # the first is granted the slot, and has not run yet
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        lease = await next_request
        assert desk.in_flight() == 1
        lease.release(Outcome.SERVED)
        assert desk.in_flight() == 0


async def test_a_request_without_inference_neither_takes_nor_awaits_a_slot() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        slotless = await desk.acquire(Demand(model=MODEL, needs_slot=False))
        assert desk.in_flight() == 1
        slotless.release(Outcome.SERVED)
        holder.release(Outcome.SERVED)
        assert desk.fleet["a"].attempt_outcomes == {Outcome.SERVED: 1}


@pytest.mark.parametrize("policy", [PolicyKind.LEAST_LOADED, PolicyKind.ADAPTIVE])
@pytest.mark.parametrize("seed", range(5))
async def test_under_random_cancels_each_slot_is_given_and_returned_once(seed: int, policy: PolicyKind) -> None:
    rng = Random(seed)
    most_in_flight = 0
    async with open_desk("a", "b", max_parallel=2, policy=policy) as desk:

        async def request() -> None:
            nonlocal most_in_flight
            priority = rng.choice(list(Priority))
            lease = await desk.acquire(Demand(model=MODEL, priority=priority, node=rng.choice(["a", "b", None])))
            try:
                most_in_flight = max(most_in_flight, desk.in_flight())
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
            finally:
                lease.release(rng.choice([Outcome.SERVED, Outcome.CLIENT_GONE]))
                lease.release(Outcome.CUT)  # a second release is none
                lease.discard()

        tasks = [asyncio.create_task(request()) for _ in range(60)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            task = rng.choice(tasks)
            if rng.random() < 0.4 and not task.done():
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert 0 < most_in_flight <= 4
        assert desk.in_flight() == 0
        assert desk.dispatcher.queued == 0
        assert Outcome.CUT not in desk.fleet["a"].attempt_outcomes
        again = [await desk.acquire() for _ in range(4)]
        assert desk.in_flight() == 4
        for lease in again:
            lease.discard()


async def test_a_slot_is_wanted_while_a_request_waits_for_it() -> None:
    async with open_desk("a", "b", max_parallel=1) as desk:
        leases = [await desk.acquire(Demand(MODEL, node=name)) for name in ("a", "b")]
        assert not desk.dispatcher.slot_is_wanted("a")
        only_b = await desk.queue(Demand(MODEL, node="b"))
        assert not desk.dispatcher.slot_is_wanted("a")
        assert desk.dispatcher.slot_is_wanted("b")
        not_a = await desk.queue(exclude=frozenset({"a"}))
        assert not desk.dispatcher.slot_is_wanted("a")
        either = await desk.queue()
        assert desk.dispatcher.slot_is_wanted("a")
        desk.share_gpu("a", "b")
        either.cancel()
        await asyncio.gather(either, return_exceptions=True)
        assert desk.dispatcher.slot_is_wanted("a"), "what waits for the other node waits for the same GPU"
        for waiting in (only_b, not_a):
            waiting.cancel()
        await asyncio.gather(only_b, not_a, return_exceptions=True)
        assert not desk.dispatcher.slot_is_wanted("b")
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_nodes_that_share_a_gpu_count_as_one() -> None:
    async with open_desk("a", "b") as desk:
        desk.share_gpu("a", "b")
        on_a = await desk.acquire(Demand(model=MODEL, node="a"))
        waits = await desk.queue(Demand(model=MODEL, node="b"))
        on_a.release(Outcome.SERVED)
        lease = await waits
        assert (lease.node.name, desk.in_flight()) == ("b", 1)
        lease.release(Outcome.SERVED)


async def test_the_requests_of_other_gateways_take_slots() -> None:
    async with open_desk("a", max_parallel=2) as desk:
        desk.others.load = 1
        desk.fleet.update_other_loads()
        holder = await desk.acquire()
        waits = await desk.queue()
        desk.others.load = 0
        desk.fleet.update_other_loads()
        desk.scheduler.note_change(desk.fleet["a"].account)
        desk.dispatcher.grant_waiting()
        (await waits).release(Outcome.SERVED)
        holder.release(Outcome.SERVED)


async def test_repr_tells_the_state() -> None:
    async with open_desk("a") as desk:
        holder, waiting = await desk.acquire(), await desk.queue()
        assert repr(desk.dispatcher) == "<Dispatcher 1 queued>"
        assert await release_in_turn(desk, [("waiting", waiting)], holder) == ["waiting"]
