"""A request that has just refused a load is not asked at once about the next load that is no better."""

from __future__ import annotations

import pytest

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.policies.base import Choice, Question
from gpumesh.balancer.scheduling.refused_loads import MAX_REFUSED_S, RefusedLoads
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.balancer.scheduling.waiting import group_of
from tests.balancer.scheduling.fleets import KEY_A, KEY_B, NOW, A, B, ask, make_node, make_scheduler, set_speed

NODES = range(9000)
GROUP = group_of(ask(residency=KEY_A), frozenset())


def make_fleet() -> Scheduler:
    """A request runs on each node that has the model B: two such nodes, one more that loads faster, one without a
    request, one with an empty memory, and one that has the model A."""
    scheduler = make_scheduler()
    for name in ("cold", "other", "fast", "idle", "empty", "hot"):
        loaded = {"empty": (), "hot": (A,)}.get(name, (B,))
        account = make_node(scheduler, name, slots=2, loaded=loaded, measured=False)
        set_speed(account, load_s=1.0 if name == "fast" else 4.0)
    for name in ("cold", "other", "fast"):
        assert scheduler.place_now(ask(B, node=name), NOW) is not None
    return scheduler


def refuse(scheduler: Scheduler, refused: RefusedLoads, account: NodeAccount, *, patience_s: float = 1.0) -> None:
    demand = ask(residency=KEY_A)
    work = scheduler.experience.estimate(demand)
    question = Question([account], demand, work, scheduler._fleet, 0.0, NOW, 0, scheduler._rng)
    refused.note_answer(GROUP, account, Choice(None, (question.forecast(account),), patience_s), NOW)


@pytest.mark.parametrize(
    ("name", "holds"),
    [("cold", True), ("other", True), ("fast", False), ("idle", False), ("empty", False), ("hot", False)],
)
def test_a_refusal_holds_for_nodes_that_are_no_better(name: str, holds: bool) -> None:
    scheduler, refused = make_fleet(), RefusedLoads(NODES)
    account = scheduler.accounts[name]
    assert not refused.holds_for(GROUP, account, NOW)
    refuse(scheduler, refused, scheduler.accounts["cold"])
    assert refused.holds_for(GROUP, account, NOW) is holds
    assert not refused.holds_for(group_of(ask(residency=KEY_B), frozenset()), account, NOW), "another group"


@pytest.mark.parametrize(("nodes", "seconds"), [(100, 0.0), (200, 0.01), (1000, 0.09), (9000, MAX_REFUSED_S)])
def test_a_refusal_holds_for_a_short_time(nodes: int, seconds: float) -> None:
    scheduler, refused = make_fleet(), RefusedLoads(range(nodes))
    cold = scheduler.accounts["cold"]
    refuse(scheduler, refused, cold)
    assert refused.holds_for(GROUP, cold, NOW + 0.9 * seconds) is (seconds > 0.0)
    assert not refused.holds_for(GROUP, cold, NOW + 1.01 * seconds)


@pytest.mark.parametrize(("name", "patience_s"), [("hot", 1.0), ("cold", MAX_REFUSED_S / 2)])
def test_what_is_no_refusal_of_a_load(name: str, patience_s: float) -> None:
    """The slot of a node with the model; and a patience whose end would come too soon to offer the slots again."""
    scheduler, refused = make_fleet(), RefusedLoads(NODES)
    refuse(scheduler, refused, scheduler.accounts[name], patience_s=patience_s)
    assert not refused.holds_for(GROUP, scheduler.accounts["cold"], NOW)


def test_a_slot_that_was_not_offered_is_taken_when_the_patience_ends() -> None:
    """The node with the model hangs. Two nodes without it get a free slot, the second while the first refusal holds."""
    scheduler = make_scheduler()
    for name in ("hot", "first", "second"):
        make_node(scheduler, name, loaded=(A if name == "hot" else B,))
    running = {name: scheduler.place_now(ask(B, node=name), NOW) for name in ("first", "second")}
    assert scheduler.place_now(ask(node="hot"), NOW) is not None
    demand = ask()
    assert scheduler.place_now(demand, NOW) is None
    entry = scheduler.wait(demand, NOW, None)
    for name, at in (("first", NOW + 0.5), ("second", NOW + 0.5001)):
        placement = running[name]
        assert placement is not None
        scheduler.end(placement.placed, at)
        assert scheduler.grants(at) == []
    until = scheduler.next_check()
    assert until is not None
    assert until == entry.payload.patience_until
    now, granted = until, scheduler.grants(until)
    while not granted:
        until = scheduler.next_check()
        assert until is not None
        assert now < until < NOW + 60.0
        now, granted = until, scheduler.grants(until)
    assert granted[0][1].placed.account.name in ("first", "second")


def test_when_a_patience_ends_the_group_is_asked_for_each_free_slot() -> None:
    scheduler, refused = make_fleet(), RefusedLoads(NODES)
    cold = scheduler.accounts["cold"]
    refuse(scheduler, refused, cold)
    refused.note_end_of_patience(GROUP, NOW)
    assert not refused.holds_for(GROUP, cold, NOW)
    refuse(scheduler, refused, cold)  # by the first of the slots that are offered now
    assert not refused.holds_for(GROUP, cold, NOW)
