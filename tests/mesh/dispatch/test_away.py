"""Nodes that are away or broken: which requests wait for them, for how long, and who tries a node again."""

from __future__ import annotations

import asyncio

import pytest

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Blame, ErrorReply, Outcome
from gpumesh.errors import ModelMissing, NoNodeError
from gpumesh.lab.profile import Faults
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.state import TunnelPhase, TunnelState
from tests.mesh.dispatch.desk import DEMAND, open_desk, release_in_turn
from tests.mesh.meshes import MODEL, node
from tests.mesh.nodes.build import NodeEvents, make_node, make_scheduler, make_spec
from tests.tunnels.polling import wait_until


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
        await desk.lose("a")
        waits = await desk.queue()
        await desk.hosts["a"].set_faults(Faults())
        lease = await waits
        assert lease.node.name == "a"
        lease.release(Outcome.SERVED)


async def test_a_node_that_stays_away_is_not_waited_for_beyond_the_grace() -> None:
    async with open_desk("a") as desk:
        await desk.lose("a")
        waits = await desk.queue()
        desk.now += 6.0
        with pytest.raises(NoNodeError):
            await waits


async def test_each_request_waits_for_the_whole_grace() -> None:
    async with open_desk("a") as desk:
        await desk.lose("a")
        early = await desk.queue()
        desk.now += 4.0
        late = await desk.queue()
        desk.now += 2.0
        with pytest.raises(NoNodeError):
            await early
        desk.dispatcher.note_nodes_changed()
        assert not late.done(), "it has waited for 2 s"
        desk.now += 4.0
        with pytest.raises(NoNodeError):
            await late
        assert desk.dispatcher.queued == 0


async def test_the_grace_of_a_request_that_has_left_is_no_matter_for_later_ones() -> None:
    async with open_desk("a", "b") as desk:
        holder = await desk.acquire(Demand(model=MODEL, node="b"))
        keeps_queue = await desk.queue(Demand(model=MODEL, node="b"))
        await desk.lose("a")
        leaves = await desk.queue(Demand(model=MODEL, node="a"))
        leaves.cancel()
        await asyncio.wait([leaves])
        desk.now += 60.0
        waits = await desk.queue(Demand(model=MODEL, node="a"))
        desk.dispatcher.note_nodes_changed()
        assert not waits.done()
        desk.now += 6.0
        with pytest.raises(NoNodeError):
            await waits
        assert await release_in_turn(desk, [("b", keeps_queue)], holder) == ["b"]


async def test_a_request_that_waits_for_a_busy_node_has_its_grace_when_the_node_goes_away() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waits = await desk.queue()
        desk.now += 60.0
        await desk.lose("a")
        holder.release(Outcome.UNREACHABLE, error="gone")
        desk.dispatcher.note_nodes_changed()
        assert not waits.done()
        desk.now += 6.0
        with pytest.raises(NoNodeError):
            await waits


async def test_a_half_open_breaker_lets_one_waiting_request_through() -> None:
    async with open_desk("a", max_parallel=4) as desk:
        await desk.fail("a")
        waiting = [await desk.queue() for _ in range(3)]
        desk.now += 1.5
        await wait_until(lambda: desk.in_flight() == 1, "one is the trial")
        assert desk.dispatcher.queued == 2
        trial = await waiting[0]
        trial.release(Outcome.SERVED)
        leases = await asyncio.gather(*waiting[1:])
        assert desk.in_flight() == 2
        for lease in leases:
            lease.release(Outcome.SERVED)


async def test_when_the_trials_answer_has_begun_the_next_request_may_go() -> None:
    async with open_desk("a", max_parallel=4) as desk:
        await desk.fail("a")
        desk.now += 1.5
        trial = await desk.acquire()
        waits = await desk.queue()
        trial.mark_answer_started()
        (await waits).release(Outcome.SERVED)
        trial.release(Outcome.SERVED)


async def test_a_trial_that_its_client_cancels_is_given_to_the_next() -> None:
    async with open_desk("a") as desk:
        await desk.fail("a")
        desk.now += 1.5
        trial = await desk.acquire()
        waits = await desk.queue()
        trial.release(Outcome.CLIENT_GONE)
        (await waits).release(Outcome.SERVED)


async def test_despite_its_breaker_a_node_is_asked_if_no_other_is_left() -> None:
    async with open_desk("a", max_parallel=2) as desk:
        await desk.fail("a")
        assert desk.dispatcher.acquire_now(DEMAND, frozenset()) is None
        leases = [await desk.dispatcher.acquire_despite_breaker(DEMAND, exclude=frozenset()) for _ in range(3)]
        assert [lease is not None for lease in leases] == [True, True, False], "only free slots"
        assert await desk.dispatcher.acquire_despite_breaker(DEMAND, exclude=frozenset({"a"})) is None
        for lease in leases[:2]:
            assert lease is not None
            lease.discard()


async def test_when_the_last_node_cannot_load_the_model_the_waiting_requests_get_an_error() -> None:
    async with open_desk("a") as desk:
        holder = await desk.acquire()
        waits = await desk.queue()
        for _ in range(2):
            desk.fleet["a"].ledger.model_breakers.record_failure(MODEL, Blame.MODEL_LOAD, "out of memory", desk.now)
            desk.now += 10.0
        holder.release(Outcome.SERVER_ERROR, reply=ErrorReply(500, "cudaMalloc failed: out of memory"))
        assert desk.dispatcher.queued == 0, "its pause is too long to wait for"
        with pytest.raises(NoNodeError):
            await waits


async def test_only_a_node_that_was_up_is_worth_waiting_for() -> None:
    async with open_desk("a", "b") as desk:
        never_up = make_node(node("c", "http://127.0.0.1:9"), desk.events, scheduler=desk.scheduler)
        fleet = Fleet([*desk.fleet, never_up], clock=desk.events.clock)
        dispatcher = Dispatcher(fleet, desk.scheduler, clock=desk.events.clock)
        only_c = Demand(model=MODEL, node="c")
        never_up.on_tunnel(TunnelState("sshtunnel", TunnelPhase.CONNECTING, last_error="no SSH greeting"))
        assert never_up.may_recover()
        assert not dispatcher.is_worth_waiting(only_c), "it has been tried, and was never up"
        desk.fleet["a"].on_tunnel(TunnelState("sshtunnel", TunnelPhase.BACKOFF, last_error="gone"))
        assert dispatcher.is_worth_waiting(Demand(model=MODEL, node="a"))
        assert not dispatcher.is_worth_waiting(Demand(model="other", node="a"))


async def test_a_node_that_was_just_opened_is_waited_for_beyond_the_grace() -> None:
    """A reload has opened it: its first connection is on its way, and the kind of its server is not known yet."""
    events, scheduler = NodeEvents(), make_scheduler()
    new = make_node(make_spec("http://127.0.0.1:9"), events, scheduler=scheduler)
    dispatcher = Dispatcher(Fleet([new], clock=events.clock), scheduler, clock=events.clock)
    new.on_tunnel(TunnelState("sshtunnel", TunnelPhase.CONNECTING))
    waits = asyncio.create_task(dispatcher.acquire(DEMAND, timeout_s=100.0))
    await wait_until(lambda: dispatcher.queued == 1, "it waits")
    events.now += 29.0
    dispatcher.note_nodes_changed()
    assert dispatcher.queued == 1
    new.on_tunnel(TunnelState("sshtunnel", TunnelPhase.BACKOFF, last_error="no route"))
    dispatcher.note_nodes_changed()
    with pytest.raises(NoNodeError):  # it has reported: it is away
        await waits
    never = asyncio.create_task(dispatcher.acquire(DEMAND, timeout_s=100.0))
    with pytest.raises(NoNodeError):
        await never
    dispatcher.close()
