"""Nodes come, change and go while requests run and wait."""

from __future__ import annotations

from random import Random

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand
from gpumesh.topology import PolicyKind
from tests.balancer.scheduling.fleets import KEY_A, NOW, A, make_node, make_scheduler

ASKED = Demand(model=A, residency=KEY_A, session="s")


def test_a_removed_node_gets_nothing_and_teaches_nothing() -> None:
    scheduler = make_scheduler()
    old = make_node(scheduler, "a")
    running = scheduler.place_now(ASKED, NOW)
    assert running is not None
    scheduler.roster.remove(old)
    assert scheduler.place_now(ASKED, NOW) is None
    new = make_node(scheduler, "a", measured=False)
    placed = scheduler.place_now(ASKED, NOW)
    assert placed is not None
    assert placed.placed.account is new, "its successor, which has a slot of its own"
    scheduler.note_first_token(running.placed, NOW + 1.0)
    counters = ServerCounters(tokens=100, eval_ms=1000.0)
    scheduler.end(running.placed, NOW + 2.0, counters)
    scheduler.end(placed.placed, NOW + 2.0)
    assert (old.in_flight, new.in_flight) == (0, 0)
    assert new.rates.is_empty, "the other answer was of another server"
    assert scheduler.accounts == {"a": new}


def test_a_group_has_no_slot_for_what_still_runs_on_a_removed_node() -> None:
    """The new tunnel leads to the same GPU."""
    scheduler = make_scheduler()
    old = make_node(scheduler, "a")
    running = scheduler.place_now(ASKED, NOW)
    assert running is not None
    scheduler.roster.remove(old)
    new = make_node(scheduler, "a")
    new.group.accounts = (new, old)
    old.group = new.group
    entry = scheduler.wait(ASKED, NOW, None)
    assert scheduler.grants(NOW + 0.1) == []
    scheduler.end(running.placed, NOW + 1.0)
    ((granted, placement),) = scheduler.grants(NOW + 1.0)
    assert (granted, placement.placed.account) == (entry, new)


@pytest.mark.parametrize("policy", list(PolicyKind))
@pytest.mark.parametrize("size", [3, 30])
def test_at_random(policy: PolicyKind, size: int) -> None:
    """A large fleet is not ranked whole."""
    random, scheduler = Random(size), make_scheduler(policy)
    for number in range(size):
        make_node(scheduler, f"n{number}", slots=2)
    running: list[PlacedRequest] = []
    gone: list[NodeAccount] = []
    now = NOW
    for _ in range(400):
        now += random.random()
        names = list(scheduler.accounts)
        match random.choice(("come", "come", "come", "end", "end", "leave", "join", "settings")):
            case "come":
                demand = Demand(model=A, residency=KEY_A, session=f"s{random.randrange(9)}")
                placement = scheduler.place_now(demand, now)
                if placement is None:
                    scheduler.wait(demand, now, None)
                else:
                    assert placement.placed.account is scheduler.accounts[placement.placed.account.name]
                    running.append(placement.placed)
            case "end" if running:
                placed = running.pop(random.randrange(len(running)))
                scheduler.note_first_token(placed, now)
                scheduler.end(placed, now, ServerCounters(tokens=20, eval_ms=200.0) if random.random() < 0.8 else None)
            case "leave" if len(names) > 1:
                gone.append(scheduler.accounts[random.choice(names)])
                scheduler.roster.remove(gone[-1])
            case "join":
                missing = [name for name in (f"n{number}" for number in range(size)) if name not in names]
                if missing:
                    make_node(scheduler, random.choice(missing), slots=2)
            case "settings":
                scheduler.change_settings(random.choice(list(PolicyKind)), max_queue=1000, pinned=frozenset())
        granted = [placement.placed for _, placement in scheduler.grants(now)]
        assert all(placed.account is scheduler.accounts[placed.account.name] for placed in granted)
        running += granted
    for placed in running:
        scheduler.end(placed, now)
    assert all(account.in_flight == 0 for account in (*gone, *scheduler.accounts.values()))
