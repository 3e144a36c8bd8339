"""The queue of the dispatcher: who goes next, and who may wait."""

from __future__ import annotations

import pytest

from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.fairness.lane import GRANTS_BEFORE_SHARE
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import DeadlineExceeded, QueueFull
from tests.mesh.dispatch.desk import open_desk, release_in_turn
from tests.mesh.meshes import MODEL


async def test_the_first_in_the_queue_is_served_first() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waiting = [(name, await desk.queue()) for name in ("one", "two", "three")]
        assert await release_in_turn(desk, waiting, holder) == ["one", "two", "three"]


async def test_a_higher_class_goes_first_however_long_a_lower_one_has_waited() -> None:
    """Ages decided before; a lower class has a small guaranteed share instead."""
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waiting = []

        async def come(name: str, priority: Priority) -> None:
            waiting.append((name, await desk.queue(Demand(model=MODEL, priority=priority))))

        await come("old batch", Priority.BATCH)
        desk.now += 3600.0
        await come("normal", Priority.NORMAL)
        await come("interactive", Priority.INTERACTIVE)
        desk.now += 60.0
        await come("later interactive", Priority.INTERACTIVE)
        await come("young batch", Priority.BATCH)
        assert await release_in_turn(desk, waiting, holder) == [
            "interactive",
            "later interactive",
            "normal",
            "old batch",
            "young batch",
        ]


async def test_a_lower_class_has_a_share_so_that_nothing_waits_for_ever() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waiting = [("batch", await desk.queue(Demand(model=MODEL, priority=Priority.BATCH)))]
        for number in range(GRANTS_BEFORE_SHARE + 1):
            chat = Demand(model=MODEL, priority=Priority.INTERACTIVE)
            waiting.append((f"chat {number}", await desk.queue(chat)))
        order = await release_in_turn(desk, waiting, holder)
        assert order.index("batch") == GRANTS_BEFORE_SHARE


async def test_within_a_class_the_client_that_was_served_least_goes_first() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waiting = []
        for name, client in (("one 1", "one"), ("one 2", "one"), ("one 3", "one"), ("two 1", "two")):
            waiting.append((name, await desk.queue(Demand(model=MODEL, client=client))))
        assert await release_in_turn(desk, waiting, holder) == ["one 1", "two 1", "one 2", "one 3"]


async def test_a_request_that_a_node_failed_keeps_its_rank() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        accepted = desk.now
        desk.now += 5.0
        waiting = [("new", await desk.queue())]
        desk.now += 5.0
        waiting.append(("failed elsewhere", await desk.queue(since=accepted)))
        assert await release_in_turn(desk, waiting, holder) == ["failed elsewhere", "new"]


async def test_a_request_that_a_node_failed_keeps_its_rank_among_other_clients() -> None:
    """The failed attempt is not counted as service of its client."""
    async with open_desk("a", "b") as desk:
        holder = await desk.acquire(Demand(model=MODEL, node="b", client="other"))
        accepted, demand = desk.now, Demand(model=MODEL, client="one")
        failing = await desk.acquire(demand)
        assert failing.node.name == "a"
        desk.now += 5.0
        waiting = [("new", await desk.queue(Demand(model=MODEL, node="b", client="two")))]
        failing.release(Outcome.UNREACHABLE, error="it failed")
        waiting.append(("failed", await desk.queue(demand, since=accepted, exclude=frozenset({"a"}))))
        assert await release_in_turn(desk, waiting, holder) == ["failed", "new"]


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


async def test_retry_after_grows_with_the_waits_of_the_class() -> None:
    async with open_desk("a", max_queue=1) as desk:
        holder = await desk.acquire()
        waits = await desk.queue()
        desk.now += 100.0
        holder.release(Outcome.SERVED)
        holder = await waits
        waits = await desk.queue()
        with pytest.raises(QueueFull) as full:
            await desk.acquire()
        assert 10.0 < full.value.retry_after_s < 100.0
        assert await release_in_turn(desk, [("waits", waits)], holder) == ["waits"]


async def test_a_queue_full_of_batch_has_room_for_people() -> None:
    async with open_desk("a", max_queue=10) as desk:
        holder = await desk.acquire()
        batch = Demand(model=MODEL, priority=Priority.BATCH)
        waiting = [(f"batch {number}", await desk.queue(batch)) for number in range(7)]
        with pytest.raises(QueueFull):
            await desk.acquire(batch)
        waiting.append(("chat", await desk.queue(Demand(model=MODEL, priority=Priority.INTERACTIVE))))
        assert (await release_in_turn(desk, waiting, holder))[0] == "chat"


async def test_the_deadline_holds_in_the_queue() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        with pytest.raises(DeadlineExceeded):
            await desk.acquire(timeout_s=0.05)
        assert desk.dispatcher.queued == 0
        holder.release(Outcome.SERVED)
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
