"""The dispatcher over running nodes: which node gets a request and which requests wait. The test sets the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import pytest

from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.balancer.queue import PRIORITY_DELAY_S
from gpumesh.errors import DeadlineExceeded, ModelMissing, NoNodeError, QueueFull
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import PolicyKind
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.mesh.meshes import MODEL, host, node
from tests.mesh.nodes.build import NodeEvents, make_node
from tests.tunnels.polling import wait_until

DEMAND = Demand(model=MODEL)


class DispatchEvents(NodeEvents):
    """A freed slot goes to the queue, as in a mesh."""

    dispatcher: Dispatcher

    def on_slot_freed(self) -> None:
        self.dispatcher.grant_waiting()


@dataclass
class Desk:
    """``now`` is the time by every clock but the tunnels'."""

    fleet: Fleet
    dispatcher: Dispatcher
    hosts: dict[str, SimOllama]
    events: DispatchEvents

    @property
    def now(self) -> float:
        return self.events.now

    @now.setter
    def now(self, now: float) -> None:
        self.events.now = now

    async def acquire(self, demand: Demand = DEMAND, **more: Any) -> Lease:
        return await self.dispatcher.acquire(demand, **{"timeout_s": 20.0, **more})

    async def queue(self, demand: Demand = DEMAND, **more: Any) -> asyncio.Task[Lease]:
        """Starts a request that is in the queue on return."""
        queued = self.dispatcher.queued
        task = asyncio.create_task(self.acquire(demand, **more))
        await wait_until(lambda: self.dispatcher.queued > queued, "it waits")
        return task

    def in_flight(self) -> int:
        return sum(node.in_flight for node in self.fleet)


@asynccontextmanager
async def open_desk(
    *names: str, max_parallel: int = 1, max_queue: int = 100, policy: PolicyKind = PolicyKind.LEAST_LOADED
) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        hosts = {name: await stack.enter_async_context(SimOllama(host(name))) for name in names}
        events = DispatchEvents(now=1000.0)
        specs = [node(name, server.url, max_parallel=max_parallel) for name, server in hosts.items()]
        fleet = Fleet([make_node(spec, events, http=http) for spec in specs], clock=events.clock)
        events.dispatcher = Dispatcher(
            fleet, policy, clock=events.clock, rng=Random(7), max_queue=max_queue, grace_s=5.0
        )
        desk = Desk(fleet, events.dispatcher, hosts, events)
        tasks = [
            asyncio.create_task(running.run(DirectTunnel(running.spec, on_change=running.on_tunnel)), name=running.name)
            for running in fleet
        ]
        try:
            await wait_until(lambda: all(running.reachable for running in fleet), "all nodes are up")
            yield desk
        finally:
            desk.dispatcher.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def release_in_turn(desk: Desk, waiting: Sequence[tuple[str, asyncio.Task[Lease]]], holder: Lease) -> list[str]:
    """Frees one slot again and again; the names in the order in which they got it."""
    served: list[str] = []
    left = dict(waiting)
    while left:
        holder.release(Outcome.SERVED)
        await asyncio.wait(left.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [name for name, task in left.items() if task.done()]
        assert len(done) == 1, "one slot, one lease"
        served += done
        holder = left.pop(done[0]).result()
    holder.release(Outcome.SERVED)
    assert desk.in_flight() == 0
    assert desk.dispatcher.queued == 0
    return served


async def test_a_free_slot_is_given_at_once_and_each_node_gets_its_share() -> None:
    async with open_desk("a", "b") as desk:
        leases = [await desk.acquire(), await desk.acquire()]
        assert {lease.node.name for lease in leases} == {"a", "b"}
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_the_first_in_the_queue_is_served_first() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waiting = [(name, await desk.queue()) for name in ("one", "two", "three")]
        assert await release_in_turn(desk, waiting, holder) == ["one", "two", "three"]


async def test_priorities_overtake_and_age() -> None:
    batch, normal = PRIORITY_DELAY_S[Priority.BATCH], PRIORITY_DELAY_S[Priority.NORMAL]
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waiting = []

        async def come(name: str, priority: Priority) -> None:
            waiting.append((name, await desk.queue(Demand(model=MODEL, priority=priority))))

        await come("old batch", Priority.BATCH)
        desk.now += batch - 1.0
        await come("normal, came when the batch was nearly due", Priority.NORMAL)
        await come("interactive, too", Priority.INTERACTIVE)
        desk.now += normal + 2.0
        await come("interactive, past the others' head starts", Priority.INTERACTIVE)
        await come("young batch", Priority.BATCH)
        assert await release_in_turn(desk, waiting, holder) == [
            "interactive, too",
            "old batch",
            "normal, came when the batch was nearly due",
            "interactive, past the others' head starts",
            "young batch",
        ]


async def test_a_request_that_a_node_failed_keeps_its_rank() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        accepted = desk.now
        desk.now += 5.0
        waiting = [("new", await desk.queue())]
        desk.now += 5.0
        waiting.append(("failed elsewhere", await desk.queue(since=accepted)))
        assert await release_in_turn(desk, waiting, holder) == ["failed elsewhere", "new"]


async def test_a_full_queue_refuses_new_requests_with_a_retry_time() -> None:
    async with open_desk("a", max_queue=1) as desk:
        holder = await desk.acquire()
        first = await desk.queue()
        with pytest.raises(QueueFull) as full:
            await desk.acquire()
        assert full.value.retry_after_s >= 1.0
        second = await desk.queue(since=desk.now)
        order = await release_in_turn(desk, [("first", first), ("accepted before", second)], holder)
        assert len(order) == 2


async def test_the_deadline_holds_in_the_queue() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        with pytest.raises(DeadlineExceeded):
            await desk.acquire(timeout_s=0.05)
        assert desk.dispatcher.queued == 0
        holder.release(Outcome.SERVED)
        assert desk.in_flight() == 0


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


async def test_a_request_for_one_node_does_not_hold_up_the_others() -> None:
    async with open_desk("a", "b") as desk:
        on_a = await desk.acquire(Demand(model=MODEL, node="a"))
        wants_a = await desk.queue(Demand(model=MODEL, node="a"))
        on_b = await desk.acquire()
        assert on_b.node.name == "b"
        assert desk.dispatcher.queued_for("a") == 1
        assert desk.dispatcher.queued_for("b") == 0
        on_a.release(Outcome.SERVED)
        assert (await wants_a).node.name == "a"


async def test_a_request_without_inference_neither_takes_nor_awaits_a_slot() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        slotless = await desk.acquire(Demand(model=MODEL, needs_slot=False))
        assert desk.in_flight() == 1
        slotless.release(Outcome.SERVED)
        holder.release(Outcome.SERVED)
        assert desk.fleet["a"].attempt_outcomes == {Outcome.SERVED: 1}


async def test_excluded_nodes_are_not_used_and_do_not_count_as_able_to_serve() -> None:
    async with open_desk("a", "b") as desk:
        not_a = frozenset({"a"})
        assert desk.dispatcher.could_serve(DEMAND, exclude=not_a)
        lease = await desk.acquire(exclude=not_a)
        assert lease.node.name == "b"
        assert desk.dispatcher.could_serve(DEMAND, exclude=not_a)  # once it has a free slot
        assert not desk.dispatcher.could_serve(DEMAND, exclude=frozenset({"a", "b"}))
        assert not desk.dispatcher.could_serve(Demand(model=MODEL, node="a"), exclude=not_a)
        with pytest.raises(NoNodeError):
            await desk.acquire(exclude=frozenset({"a", "b"}))


async def test_a_request_that_a_node_failed_does_not_hold_up_others_from_that_node() -> None:
    async with open_desk("a", "b") as desk:
        leases = {name: await desk.acquire(Demand(MODEL, node=name)) for name in ("a", "b")}
        not_a = await desk.queue(exclude=frozenset({"a"}))  # before the other one, and it cannot go to a
        either = await desk.queue()
        leases["a"].release(Outcome.SERVED)
        lease = await either
        assert lease.node.name == "a"
        leases["b"].release(Outcome.SERVED)
        assert (await not_a).node.name == "b"
        lease.release(Outcome.SERVED)
        not_a.result().release(Outcome.SERVED)


async def test_a_missing_model_is_an_error_at_once_also_for_waiting_requests() -> None:
    async with open_desk("a") as desk:
        with pytest.raises(ModelMissing):
            await desk.acquire(Demand(model="other"))
        holder = await desk.acquire()
        waits = await desk.queue()
        desk.hosts["a"].engine.store.clear()
        await desk.fleet["a"].refresh()
        with pytest.raises(ModelMissing):
            await waits
        holder.release(Outcome.SERVED)


@pytest.mark.slow
async def test_a_node_that_is_away_for_a_moment_is_waited_for() -> None:
    async with open_desk("a") as desk:
        await desk.hosts["a"].set_faults(Faults(refuse=True))
        desk.fleet["a"].tunnel.suspect("test")  # type: ignore[union-attr]
        await wait_until(lambda: not desk.fleet["a"].reachable, "it is away")
        waits = await desk.queue()
        await desk.hosts["a"].set_faults(Faults())
        lease = await waits
        assert lease.node.name == "a"
        lease.release(Outcome.SERVED)


async def test_a_node_that_stays_away_is_not_waited_for_beyond_the_grace() -> None:
    async with open_desk("a") as desk:
        await desk.hosts["a"].set_faults(Faults(refuse=True))
        desk.fleet["a"].tunnel.suspect("test")  # type: ignore[union-attr]
        await wait_until(lambda: not desk.fleet["a"].reachable, "it is away")
        waits = await desk.queue()
        desk.now += 6.0
        with pytest.raises(NoNodeError):
            await waits


async def test_only_a_node_that_was_up_is_worth_waiting_for() -> None:
    async with open_desk("a", "b") as desk:
        never_up = make_node(node("c", "http://127.0.0.1:9"), desk.events)
        fleet = Fleet([*desk.fleet, never_up], clock=desk.events.clock)
        dispatcher = Dispatcher(fleet, PolicyKind.LEAST_LOADED, clock=desk.events.clock, rng=Random(7), max_queue=1)
        only_c = Demand(model=MODEL, node="c")
        never_up.on_tunnel(TunnelState("sshtunnel", TunnelPhase.CONNECTING, last_error="no SSH greeting"))
        assert never_up.may_recover()
        assert not dispatcher.is_worth_waiting(only_c), "it has been tried, and was never up"
        desk.fleet["a"].on_tunnel(TunnelState("sshtunnel", TunnelPhase.BACKOFF, last_error="gone"))
        assert dispatcher.is_worth_waiting(Demand(model=MODEL, node="a"))
        assert not dispatcher.is_worth_waiting(Demand(model="other", node="a"))


async def test_the_queue_is_shown_in_the_order_of_service() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        batch = await desk.queue(Demand(model=MODEL, priority=Priority.BATCH, id="slow"))
        desk.now += 2.0
        quick = await desk.queue(Demand(model=MODEL, priority=Priority.INTERACTIVE, id="quick"))
        shown = desk.dispatcher.waiting(10)
        assert [(waiting.position, waiting.id, waiting.priority) for waiting in shown] == [
            (0, "quick", "interactive"),
            (1, "slow", "batch"),
        ]
        assert shown[1].waited_s == 2.0
        assert len(desk.dispatcher.waiting(1)) == 1
        assert await release_in_turn(desk, [("batch", batch), ("quick", quick)], holder) == ["quick", "batch"]


@pytest.mark.parametrize("seed", range(5))
async def test_under_random_cancels_each_slot_is_given_and_returned_once(seed: int) -> None:
    rng = Random(seed)
    most_in_flight = 0
    async with open_desk("a", "b", max_parallel=2) as desk:

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
        desk.fleet["a"].role.group = desk.fleet["b"].role.group = "one GPU"
        either.cancel()
        await asyncio.gather(either, return_exceptions=True)
        assert desk.dispatcher.slot_is_wanted("a"), "what waits for the other node waits for the same GPU"
        for waiting in (only_b, not_a):
            waiting.cancel()
        await asyncio.gather(only_b, not_a, return_exceptions=True)
        assert not desk.dispatcher.slot_is_wanted("b")
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_a_request_for_an_endless_answer_is_ranked_like_others() -> None:
    async with open_desk("a", "b", policy=PolicyKind.ADAPTIVE) as desk:
        lease = await desk.acquire(Demand(model=MODEL, max_tokens=10**400))
        lease.release(Outcome.SERVED)
        assert desk.in_flight() == 0


async def test_repr_tells_the_state() -> None:
    async with open_desk("a") as desk:
        holder, waiting = await desk.acquire(), await desk.queue()
        assert repr(desk.dispatcher) == "<Dispatcher least-loaded 1 queued>"
        assert await release_in_turn(desk, [("waiting", waiting)], holder) == ["waiting"]
