"""Who goes where and who waits: the dispatcher over running nodes, its clock in the test's hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import pytest

from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.balancer.queue import HEAD_START_S
from gpumesh.errors import DeadlineExceeded, ModelMissing, NoNodeError, QueueFull
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.nodes.node import Lease, Node
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import PolicyKind
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.mesh.meshes import MODEL, host, node
from tests.tunnels.polling import wait_until

DEMAND = Demand(model=MODEL)


@dataclass
class Desk:
    """``now`` is the time that all but the tunnels go by."""

    now: float = 1000.0
    nodes: dict[str, Node] = field(default_factory=dict)
    hosts: dict[str, SimOllama] = field(default_factory=dict)
    dispatcher: Dispatcher = field(init=False)

    def clock(self) -> float:
        return self.now

    def freed(self) -> None:
        self.dispatcher.grant_waiting()

    async def acquire(self, demand: Demand = DEMAND, **more: Any) -> Lease:
        return await self.dispatcher.acquire(demand, **{"timeout_s": 20.0, **more})

    async def waits(self, demand: Demand = DEMAND, **more: Any) -> asyncio.Task[Lease]:
        """A request that is in the queue on return."""
        queued = self.dispatcher.queued
        task = asyncio.create_task(self.acquire(demand, **more))
        await wait_until(lambda: self.dispatcher.queued > queued, "it waits")
        return task

    def in_flight(self) -> int:
        return sum(one.candidate(self.now).in_flight for one in self.nodes.values())


@asynccontextmanager
async def desk(
    *names: str, max_parallel: int = 1, max_queue: int = 100, policy: PolicyKind = PolicyKind.LEAST_LOADED
) -> AsyncIterator[Desk]:
    made = Desk()
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        tasks = []
        for name in names:
            server = await stack.enter_async_context(SimOllama(host(name)))
            spec = node(name, server.url, max_parallel=max_parallel)
            made.hosts[name] = server
            made.nodes[name] = Node(
                spec,
                clock=made.clock,
                http=http,
                changes=ChangeNotifier(),
                on_slot_freed=made.freed,
                on_gpus_identified=lambda: None,
            )
        made.dispatcher = Dispatcher(
            made.nodes, policy, clock=made.clock, rng=Random(7), max_queue=max_queue, grace_s=5.0
        )
        for name, one in made.nodes.items():
            tunnel = DirectTunnel(one.spec, on_change=one.on_tunnel)
            tasks.append(asyncio.create_task(one.run(tunnel), name=name))
        try:
            await wait_until(lambda: all(one.reachable for one in made.nodes.values()), "all nodes are up")
            yield made
        finally:
            made.dispatcher.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def order_of(made: Desk, waiting: Sequence[tuple[str, asyncio.Task[Lease]]], holder: Lease) -> list[str]:
    """Frees one place again and again; the names in the order in which they got it."""
    served: list[str] = []
    left = dict(waiting)
    while left:
        holder.release(Outcome.SERVED)
        await asyncio.wait(left.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [name for name, task in left.items() if task.done()]
        assert len(done) == 1, "one place, one lease"
        served += done
        holder = left.pop(done[0]).result()
    holder.release(Outcome.SERVED)
    assert made.in_flight() == 0
    assert made.dispatcher.queued == 0
    return served


async def test_a_free_place_is_given_at_once_and_each_node_its_share() -> None:
    async with desk("a", "b") as made:
        leases = [await made.acquire(), await made.acquire()]
        assert {lease.node.name for lease in leases} == {"a", "b"}
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_who_came_first_is_served_first() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        waiting = [(name, await made.waits()) for name in ("one", "two", "three")]
        assert await order_of(made, waiting, holder) == ["one", "two", "three"]


async def test_priorities_overtake_and_age() -> None:
    batch, normal = HEAD_START_S[Priority.BATCH], HEAD_START_S[Priority.NORMAL]
    async with desk("a") as made:
        holder = await made.acquire()
        waiting = []

        async def come(name: str, priority: Priority) -> None:
            waiting.append((name, await made.waits(Demand(model=MODEL, priority=priority))))

        await come("old batch", Priority.BATCH)
        made.now += batch - 1.0
        await come("normal, came when the batch was nearly due", Priority.NORMAL)
        await come("interactive, too", Priority.INTERACTIVE)
        made.now += normal + 2.0
        await come("interactive, past the others' head starts", Priority.INTERACTIVE)
        await come("young batch", Priority.BATCH)
        assert await order_of(made, waiting, holder) == [
            "interactive, too",
            "old batch",
            "normal, came when the batch was nearly due",
            "interactive, past the others' head starts",
            "young batch",
        ]


async def test_whoever_was_failed_waits_from_when_it_was_accepted() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        accepted = made.now
        made.now += 5.0
        waiting = [("new", await made.waits())]
        made.now += 5.0
        waiting.append(("failed elsewhere", await made.waits(since=accepted)))
        assert await order_of(made, waiting, holder) == ["failed elsewhere", "new"]


async def test_past_the_bound_new_ones_are_turned_away_with_a_time_to_come_back() -> None:
    async with desk("a", max_queue=1) as made:
        holder = await made.acquire()
        first = await made.waits()
        with pytest.raises(QueueFull) as full:
            await made.acquire()
        assert full.value.retry_after_s >= 1.0
        second = await made.waits(since=made.now)
        order = await order_of(made, [("first", first), ("accepted before", second)], holder)
        assert len(order) == 2


async def test_the_deadline_holds_in_the_queue() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        with pytest.raises(DeadlineExceeded):
            await made.acquire(timeout_s=0.05)
        assert made.dispatcher.queued == 0
        holder.release(Outcome.SERVED)
        assert made.in_flight() == 0


async def test_who_leaves_the_queue_leaves_it_at_once() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        leaves, stays = await made.waits(), await made.waits()
        leaves.cancel()
        await asyncio.wait([leaves])
        assert made.dispatcher.queued == 1
        assert await order_of(made, [("stays", stays)], holder) == ["stays"]


async def test_who_leaves_in_the_moment_of_the_grant_gives_the_place_back() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        leaves, next_one = await made.waits(), await made.waits()
        holder.release(Outcome.SERVED)  # the first is granted the place, and has not run yet
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        lease = await next_one
        assert made.in_flight() == 1
        lease.release(Outcome.SERVED)
        assert made.in_flight() == 0


async def test_whom_only_one_node_can_serve_holds_up_nobody_else() -> None:
    async with desk("a", "b") as made:
        on_a = await made.acquire(Demand(model=MODEL, node="a"))
        wants_a = await made.waits(Demand(model=MODEL, node="a"))
        on_b = await made.acquire()
        assert on_b.node.name == "b"
        assert made.dispatcher.queued_for("a") == 1
        assert made.dispatcher.queued_for("b") == 0
        on_a.release(Outcome.SERVED)
        assert (await wants_a).node.name == "a"


async def test_what_costs_no_inference_neither_takes_nor_awaits_a_place() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        aside = await made.acquire(Demand(model=MODEL, needs_slot=False))
        assert made.in_flight() == 1
        aside.release(Outcome.SERVED)
        holder.release(Outcome.SERVED)
        assert made.nodes["a"].attempt_outcomes == {Outcome.SERVED: 1}


async def test_excluded_nodes_are_not_used_and_could_serve_tells_of_others() -> None:
    async with desk("a", "b") as made:
        not_a = frozenset({"a"})
        assert made.dispatcher.could_serve(DEMAND, exclude=not_a)
        lease = await made.acquire(exclude=not_a)
        assert lease.node.name == "b"
        assert made.dispatcher.could_serve(DEMAND, exclude=not_a)  # once it has a free place
        assert not made.dispatcher.could_serve(DEMAND, exclude=frozenset({"a", "b"}))
        assert not made.dispatcher.could_serve(Demand(model=MODEL, node="a"), exclude=not_a)
        with pytest.raises(NoNodeError):
            await made.acquire(exclude=frozenset({"a", "b"}))


async def test_what_nobody_has_is_said_at_once_also_to_those_who_wait() -> None:
    async with desk("a") as made:
        with pytest.raises(ModelMissing):
            await made.acquire(Demand(model="other"))
        holder = await made.acquire()
        waits = await made.waits()
        made.hosts["a"].engine.store.clear()
        await made.nodes["a"].refresh()
        with pytest.raises(ModelMissing):
            await waits
        holder.release(Outcome.SERVED)


@pytest.mark.slow
async def test_a_node_that_is_away_for_a_moment_is_waited_for() -> None:
    async with desk("a") as made:
        await made.hosts["a"].set_faults(Faults(refuse=True))
        made.nodes["a"].tunnel.suspect("test")  # type: ignore[union-attr]
        await wait_until(lambda: not made.nodes["a"].reachable, "it is away")
        waits = await made.waits()
        await made.hosts["a"].set_faults(Faults())
        lease = await waits
        assert lease.node.name == "a"
        lease.release(Outcome.SERVED)


async def test_a_node_that_stays_away_is_not_waited_for_beyond_the_grace() -> None:
    async with desk("a") as made:
        await made.hosts["a"].set_faults(Faults(refuse=True))
        made.nodes["a"].tunnel.suspect("test")  # type: ignore[union-attr]
        await wait_until(lambda: not made.nodes["a"].reachable, "it is away")
        waits = await made.waits()
        made.now += 6.0
        with pytest.raises(NoNodeError):
            await waits


async def test_only_a_node_that_was_there_is_worth_waiting_for() -> None:
    async with desk("a", "b") as made:
        never = made.nodes["c"] = Node(
            node("c", "http://127.0.0.1:9"),
            clock=made.clock,
            http=httpx.AsyncClient(trust_env=False),
            changes=ChangeNotifier(),
            on_slot_freed=made.freed,
            on_gpus_identified=lambda: None,
        )
        only_c = Demand(model=MODEL, node="c")
        never.on_tunnel(TunnelState("sshtunnel", TunnelPhase.CONNECTING, last_error="no SSH greeting"))
        assert never.may_recover
        assert not made.dispatcher.worth_waiting(only_c), "it has been tried, and was never up"
        made.nodes["a"].on_tunnel(TunnelState("sshtunnel", TunnelPhase.BACKOFF, last_error="gone"))
        assert made.dispatcher.worth_waiting(Demand(model=MODEL, node="a"))
        assert not made.dispatcher.worth_waiting(Demand(model="other", node="a"))


async def test_the_queue_is_shown_next_first() -> None:
    async with desk("a") as made:
        holder = await made.acquire()
        batch = await made.waits(Demand(model=MODEL, priority=Priority.BATCH, id="slow"))
        made.now += 2.0
        quick = await made.waits(Demand(model=MODEL, priority=Priority.INTERACTIVE, id="quick"))
        shown = made.dispatcher.waiting(10)
        assert [(one.position, one.id, one.priority) for one in shown] == [
            (0, "quick", "interactive"),
            (1, "slow", "batch"),
        ]
        assert shown[1].waited_s == 2.0
        assert len(made.dispatcher.waiting(1)) == 1
        assert await order_of(made, [("batch", batch), ("quick", quick)], holder) == ["quick", "batch"]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_cancelled_each_place_is_given_once_and_given_back_once(seed: int) -> None:
    rng = Random(seed)
    most = 0
    async with desk("a", "b", max_parallel=2) as made:

        async def one() -> None:
            nonlocal most
            priority = rng.choice(list(Priority))
            lease = await made.acquire(Demand(model=MODEL, priority=priority, node=rng.choice(["a", "b", None])))
            try:
                most = max(most, made.in_flight())
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
            finally:
                lease.release(rng.choice([Outcome.SERVED, Outcome.CLIENT_GONE]))
                lease.release(Outcome.CUT)  # a second release is none
                lease.discard()

        tasks = [asyncio.create_task(one()) for _ in range(60)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            task = rng.choice(tasks)
            if rng.random() < 0.4 and not task.done():
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert 0 < most <= 4
        assert made.in_flight() == 0
        assert made.dispatcher.queued == 0
        assert Outcome.CUT not in made.nodes["a"].attempt_outcomes
        again = [await made.acquire() for _ in range(4)]
        assert made.in_flight() == 4
        for lease in again:
            lease.discard()


async def test_a_slot_is_wanted_while_a_request_waits_that_it_would_be_given_to() -> None:
    async with desk("a", "b", max_parallel=1) as made:
        leases = [await made.acquire(Demand(MODEL, node=name)) for name in ("a", "b")]
        assert not made.dispatcher.slot_is_wanted("a")
        only_b = await made.waits(Demand(MODEL, node="b"))
        assert not made.dispatcher.slot_is_wanted("a")
        assert made.dispatcher.slot_is_wanted("b")
        not_a = await made.waits(exclude=frozenset({"a"}))
        assert not made.dispatcher.slot_is_wanted("a")
        either = await made.waits()
        assert made.dispatcher.slot_is_wanted("a")
        made.nodes["a"].group = made.nodes["b"].group = "one GPU"
        either.cancel()
        await asyncio.gather(either, return_exceptions=True)
        assert made.dispatcher.slot_is_wanted("a"), "what waits for the other node waits for the same GPU"
        for waiting in (only_b, not_a):
            waiting.cancel()
        await asyncio.gather(only_b, not_a, return_exceptions=True)
        assert not made.dispatcher.slot_is_wanted("b")
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_a_request_for_an_endless_answer_is_ranked_like_others() -> None:
    async with desk("a", "b", policy=PolicyKind.ADAPTIVE) as made:
        lease = await made.acquire(Demand(model=MODEL, max_tokens=10**400))
        lease.release(Outcome.SERVED)
        assert made.in_flight() == 0
