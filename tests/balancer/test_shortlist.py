"""The shortlist of a large fleet: it leaves no request waiting for which a node has room, and finds the good nodes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.prefixes.prints import print_from_ids
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.balancer.scheduling.shortlist import MAX_RANKED_WHOLE, MAX_TABLES, Shortlist
from gpumesh.topology import BackendKind, PolicyKind

MODELS = ("a:8b", "b:8b")
COUNTERS = ServerCounters(tokens=100, eval_ms=2000.0, prompt_tokens=100, prompt_ms=50.0, load_ms=1.0, total_ms=2100.0)


def make_scheduler(
    count: int,
    policy: PolicyKind = PolicyKind.ADAPTIVE,
    *,
    slots: int = 1,
    model_in_memory: Callable[[int], str | None] = lambda _: MODELS[0],
    tier: Callable[[int], int] = lambda _: 1,
) -> Scheduler:
    scheduler = Scheduler(policy, rng=Random(1), max_queue=1000)
    for number in range(count):
        account = scheduler.roster.add(f"node{number:03}", max_parallel=slots, tier=tier(number))
        account.kind, account.is_up, account.models = BackendKind.OLLAMA, True, frozenset(MODELS)
        account.residency.memory_mib = 10_000
        account.residency.file_mib = dict.fromkeys(MODELS, 6000)
        model = model_in_memory(number)
        loaded = {} if model is None else {model: (8000, None)}
        account.residency.replace_with_report(loaded, asked_at=0.0)
        scheduler.note_report(account)
    return scheduler


def demand(model: str = MODELS[0], **values: object) -> Demand:
    return Demand(model, residency=ResidencyKey(model), prompt_tokens=100, **values)  # type: ignore[arg-type]


def place(scheduler: Scheduler, wanted: Demand, now: float, exclude: frozenset[str] = frozenset()) -> str:
    placement = scheduler.place_now(wanted, now, exclude=exclude)
    assert placement is not None
    return placement.placed.account.name


@pytest.mark.parametrize("policy", list(PolicyKind))
def test_each_slot_of_a_large_fleet_is_used_before_a_request_waits(policy: PolicyKind) -> None:
    scheduler = make_scheduler(60, policy, slots=2)
    used = [place(scheduler, demand(), 10.0) for _ in range(120)]
    assert all(used.count(name) == 2 for name in scheduler.accounts)
    assert scheduler.place_now(demand(), 10.0) is None


def test_the_only_node_with_the_model_in_memory_is_found() -> None:
    scheduler = make_scheduler(300, model_in_memory=lambda number: MODELS[number == 217])
    assert place(scheduler, demand(MODELS[1]), 10.0) == "node217"


def test_the_only_empty_node_is_found_for_a_model_that_is_nowhere_in_memory() -> None:
    scheduler = make_scheduler(300, model_in_memory=lambda number: None if number == 217 else MODELS[0])
    for _ in range(50):  # the other model is asked for, so to push it out costs something
        place(scheduler, demand(), 10.0)
    assert place(scheduler, demand(MODELS[1]), 10.0) == "node217"


def test_the_node_with_the_beginning_of_the_prompt_is_found() -> None:
    scheduler = make_scheduler(300, slots=4)
    prompt = print_from_ids(tuple(range(40)), id_bytes=2000, size=80_000)
    wanted = Demand(MODELS[0], residency=ResidencyKey(MODELS[0]), prompt_tokens=20_000, prompt=prompt)
    first = place(scheduler, wanted, 10.0)
    for now in range(20, 30):
        for placed in list(scheduler.accounts[first].placed):
            scheduler.note_first_token(placed, float(now))
            scheduler.end(placed, float(now))
        assert place(scheduler, wanted, float(now)) == first


def test_a_lower_tier_is_used_only_when_the_upper_is_full() -> None:
    scheduler = make_scheduler(100, tier=lambda number: 1 if number < 30 else 2)
    assert {place(scheduler, demand(), 10.0) for _ in range(30)} == set(list(scheduler.accounts)[:30])
    assert place(scheduler, demand(), 10.0) >= "node030"


def test_nodes_that_failed_the_request_or_are_away_or_broken_are_not_chosen() -> None:
    scheduler = make_scheduler(40)
    names = list(scheduler.accounts)
    for name in names[:10]:
        scheduler.accounts[name].is_up = False
        scheduler.note_report(scheduler.accounts[name])
    for name in names[10:20]:
        scheduler.accounts[name].breaker = scheduler.accounts[name].breaker.trip(10.0)
    used = {place(scheduler, demand(), 10.0, frozenset(names[20:30])) for _ in range(10)}
    assert used == set(names[30:])
    assert not scheduler.choice.can_serve(demand(), 10.0, exclude=frozenset(names[20:]))
    assert scheduler.choice.can_serve(demand(), 10.0, exclude=frozenset(names[21:]))


def test_round_robin_takes_all_nodes_of_a_large_fleet_in_turn() -> None:
    scheduler = make_scheduler(50, PolicyKind.ROUND_ROBIN, slots=8)
    assert [place(scheduler, demand(), 10.0) for _ in range(100)] == list(scheduler.accounts) * 2


def test_a_freed_node_takes_a_waiting_request() -> None:
    scheduler = make_scheduler(40)
    placed = [scheduler.place_now(demand(), 10.0) for _ in range(40)]
    entry = scheduler.wait(demand(), 10.0, "payload")
    assert not scheduler.grants(10.0)
    first = placed[0]
    assert first is not None
    scheduler.end(first.placed, 12.0, COUNTERS)
    granted = scheduler.grants(12.0)
    assert [(found, placement.placed.account.name) for found, placement in granted] == [
        (entry, first.placed.account.name)
    ]


def test_tables_are_bounded_although_clients_ask_for_any_context() -> None:
    accounts = make_scheduler(30).accounts
    shortlist = Shortlist(accounts, Random(1))
    for context in range(3 * MAX_TABLES):
        shortlist.pick(Demand(MODELS[0], residency=ResidencyKey(MODELS[0], context)), {}, 10.0)
    assert len(shortlist._tables) == MAX_TABLES


def free_nodes(scheduler: Scheduler, wanted: Demand, now: float) -> list[NodeAccount]:
    """The nodes that have room, and need no load that must wait."""
    accounts = scheduler.choice.select(wanted, now)
    question = scheduler._question(accounts, wanted, scheduler.experience.estimate(wanted), now)
    return [account for account in accounts if question.forecast(account).is_free]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(MAX_RANKED_WHOLE + 1, 40))
def test_no_request_waits_while_a_node_that_could_serve_it_has_room(seed: int, slots: int, count: int) -> None:
    """Whatever has happened before, with and without loads; but a request may wait for a better node."""
    rng = Random(seed)
    scheduler = make_scheduler(count, slots=slots, model_in_memory=lambda number: rng.choice((*MODELS, None)))
    running: list[PlacedRequest] = []
    now = 1000.0
    for _ in range(6 * count):
        now += rng.random() * 0.2
        action = rng.random()
        if action < 0.65:
            wanted = demand(rng.choice(MODELS))
            placement = scheduler.place_now(wanted, now)
            if placement is not None:
                running.append(placement.placed)
                assert placement.forecast.is_free
            elif free_nodes(scheduler, wanted, now):
                assert scheduler._refused is not None
                assert scheduler._refused.choice.patience_s is not None
        elif action < 0.9 and running:
            placed = running.pop(rng.randrange(len(running)))
            scheduler.note_first_token(placed, now)
            scheduler.end(placed, now + 0.01, COUNTERS)
        else:
            account = rng.choice(list(scheduler.accounts.values()))
            account.is_up = rng.random() < 0.8
            scheduler.note_report(account)


def test_a_waiting_request_gets_the_one_node_that_may_load_its_model_now() -> None:
    """All other nodes have a free slot too, but the model in their memory must stay for a moment."""
    scheduler = make_scheduler(60)
    last = scheduler.accounts["node059"]
    last.is_up = False
    scheduler.note_report(last)
    for account in scheduler.accounts.values():
        if account is not last:
            account.residency.loaded[MODELS[0]].loaded_at = 100.0
            assert scheduler.place_now(replace(demand(), node=account.name), 100.0) is not None  # it runs there
    assert scheduler.place_now(demand(MODELS[1]), 101.0) is None
    entry = scheduler.wait(demand(MODELS[1]), 101.0, "payload")
    assert not scheduler.grants(101.0)
    last.is_up = True
    scheduler.note_report(last)
    granted = scheduler.grants(103.0)  # it is not known any more that the others are blocked
    assert [(found, placement.placed.account.name) for found, placement in granted] == [(entry, "node059")]


def test_the_fastest_of_many_free_nodes_are_used() -> None:
    scheduler = make_scheduler(300)
    fast = {f"node{number:03}" for number in range(200, 205)}
    for name, account in scheduler.accounts.items():
        token_s = 0.005 if name in fast else 0.02
        account.rates.learn(MODELS[0], tokens=200, eval_s=200 * token_s, unread_tokens=1000, prompt_s=0.3)
        scheduler.note_report(account)
    assert {place(scheduler, demand(), 10.0) for _ in fast} == fast
