"""Where requests go, what they wait for, and how long."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.rates import ServiceRates
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.balancer.scheduling.waiting import Waiting
from gpumesh.topology import PolicyKind
from tests.balancer.scheduling.fleets import (
    KEY_A,
    KEY_B,
    LOAD_S,
    NOW,
    A,
    B,
    ask,
    ask_long,
    make_node,
    make_scheduler,
    set_speed,
)


def place(scheduler: Scheduler, demand: Demand | None = None, now: float = NOW) -> PlacedRequest:
    """Places a request that finds a slot at once."""
    placement = scheduler.place_now(ask() if demand is None else demand, now)
    assert placement is not None
    return placement.placed


def start(scheduler: Scheduler, demand: Demand | None = None, now: float = NOW) -> PlacedRequest:
    """The same, and its answer begins at once."""
    placed = place(scheduler, demand, now)
    scheduler.note_first_token(placed, now)
    return placed


def send(
    scheduler: Scheduler, name: str, demand: Demand | None = None, now: float = NOW
) -> QueueEntry[Waiting] | Placement:
    """Does with a new request what the mesh does: gives it a slot, or lets it wait."""
    demand = ask() if demand is None else demand
    placement = scheduler.place_now(demand, now)
    return scheduler.wait(demand, now, name) if placement is None else placement


def send_waiting(
    scheduler: Scheduler, name: str, demand: Demand | None = None, now: float = NOW
) -> QueueEntry[Waiting]:
    """Sends a request that has to wait."""
    entry = send(scheduler, name, demand, now)
    assert isinstance(entry, QueueEntry)
    return entry


def grants(scheduler: Scheduler, now: float) -> list[tuple[object, str]]:
    """The payloads and nodes of the requests that get a slot now."""
    return [(entry.payload.payload, placement.placed.account.name) for entry, placement in scheduler.grants(now)]


def ask_often(scheduler: Scheduler, key: ResidencyKey, now: float = NOW, *, per_s: float = 0.5) -> None:
    """Lets the key have been asked for in the last minutes."""
    for number in range(int(120 * per_s)):
        scheduler._fleet.demands.note_request(key, now - 120.0 + number / per_s)
    scheduler._fleet.demands.note_service(key, 1.0)


# -- residency is a cost, and waiting is a choice ----------------------------------------------------------------------


def make_two_models() -> tuple[Scheduler, NodeAccount, NodeAccount]:
    """Two nodes, each with the only copy of a model that is asked for, and no room for a second model. A load takes
    12 s."""
    scheduler = make_scheduler()
    hot, cold = make_node(scheduler, "hot", loaded=(A,)), make_node(scheduler, "cold", loaded=(B,))
    for node in (hot, cold):
        node.rates = ServiceRates()
        set_speed(node, load_s=12.0)
    ask_often(scheduler, KEY_A)
    ask_often(scheduler, KEY_B)
    return scheduler, hot, cold


def test_a_full_hot_node_is_awaited_instead_of_a_cold_one_whose_only_copy_of_another_model_would_be_evicted() -> None:
    scheduler, hot, cold = make_two_models()
    running = start(scheduler)
    assert running.account is hot
    entry = send_waiting(scheduler, "second")
    assert grants(scheduler, NOW) == []
    assert cold.residency.is_resident(KEY_B)
    assert entry.payload.patience_until is not None
    assert scheduler.next_check() == entry.payload.patience_until
    scheduler.end(running, NOW + 1.0)
    assert grants(scheduler, NOW + 1.0) == [("second", "hot")]
    assert scheduler.next_check() is None


def test_the_cold_node_still_serves_its_own_model() -> None:
    scheduler, _, cold = make_two_models()
    start(scheduler)
    send_waiting(scheduler, "second")
    assert start(scheduler, ask(B)).account is cold


def test_the_model_is_loaded_elsewhere_when_the_queue_is_long() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "hot", loaded=(A,))
    make_node(scheduler, "cold", loaded=())
    ask_often(scheduler, KEY_A, per_s=1.0)
    start(scheduler)
    waiting = 0
    while isinstance(send(scheduler, f"r{waiting}"), QueueEntry):
        waiting += 1
        if grants(scheduler, NOW):
            break
        assert waiting < 40, "the queue grows, and nobody loads the model"
    assert waiting >= 1, "one request of a second is no reason for a load of four"
    assert scheduler.accounts["cold"].residency.is_resident(KEY_A)


def test_patience_ends() -> None:
    """The running answer does not end when it should: the request that waits for its slot loads the model elsewhere,
    before it has waited longer than the load would have taken, with a margin."""
    scheduler, _, cold = make_two_models()
    start(scheduler)
    send_waiting(scheduler, "second")
    now, granted = NOW, scheduler.grants(NOW)
    while not granted:
        check_at = scheduler.next_check()
        assert check_at is not None, "nobody would look again"
        assert now < check_at < NOW + 300.0
        now = check_at
        granted = scheduler.grants(now)
    [(entry, placement)] = granted
    assert entry.payload.payload == "second"
    assert placement.placed.account is cold
    assert cold.residency.is_resident(KEY_A)
    assert now - NOW <= 2.0 * placement.forecast.total_s, "at the worst it has lost as much again as the load costs"


def test_a_request_that_has_no_free_slot_anywhere_has_no_patience_to_end() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "n")
    start(scheduler)
    entry = send_waiting(scheduler, "second")
    assert entry.payload.patience_until is None
    assert scheduler.next_check() is None


def test_a_free_node_is_not_left_for_one_that_is_only_a_little_better() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "fast", speed=1.3)
    make_node(scheduler, "slow")
    assert start(scheduler).account.name == "fast"
    assert start(scheduler, now=NOW + 0.1).account.name == "slow"


def test_a_much_slower_node_is_left_free() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "gpu")
    make_node(scheduler, "cpu", speed=0.02)
    start(scheduler)
    send_waiting(scheduler, "second", now=NOW + 0.5)
    assert scheduler.next_check() is not None


def test_two_contexts_of_one_model_settle_on_two_nodes() -> None:
    """Issue 13: two clients that differ only in num_ctx."""
    scheduler = make_scheduler()
    for name in ("one", "other"):
        make_node(scheduler, name, loaded={A: 4096})
    small, large = ResidencyKey(A, 4096), ResidencyKey(A, 16384)
    loads, now = 0, NOW
    for number in range(40):
        now += 2.0
        key = (small, large)[number % 2]
        placement = scheduler.place_now(ask(residency=key), now)
        if placement is None:
            continue
        loads += placement.placed.needs_load
        scheduler.note_first_token(placement.placed, now + 0.1)
        scheduler.end(placement.placed, now + 1.1, ServerCounters(tokens=100, eval_ms=1000, total_ms=1000, prompt_ms=0))
    assert loads == 1


def test_a_second_copy_of_a_busy_model_is_loaded_where_it_costs_nothing() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "hot", loaded=(A,), slots=1)
    make_node(scheduler, "idle", loaded=(B,), slots=1)
    now = NOW
    running: dict[PlacedRequest, float] = {}
    for _ in range(60):  # one request a second, of 1.5 s each: more than a copy can serve
        now += 1.0
        for placed in [placed for placed, ends_at in running.items() if ends_at <= now]:
            scheduler.end(placed, now)
            del running[placed]
        started = [placement.placed for _, placement in scheduler.grants(now)]
        sent = send(scheduler, "r", ask(tokens=150), now)
        if isinstance(sent, Placement):
            started.append(sent.placed)
        started += [placement.placed for _, placement in scheduler.grants(now)]
        for placed in started:
            load_s = LOAD_S if placed.drain_s is not None else 0.0
            running[placed] = now + load_s + 1.5
            if not load_s:
                scheduler.note_first_token(placed, now)
    assert scheduler.accounts["idle"].residency.is_resident(KEY_A)


# -- one load at a time ------------------------------------------------------------------------------------------------


def test_a_node_that_loads_a_model_starts_no_other_load() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=(), slots=4)
    first = place(scheduler, ask(A))
    send_waiting(scheduler, "b", ask(B))
    assert place(scheduler, ask(A)).needs_load, "the same load serves it"
    scheduler.note_report(node)
    assert grants(scheduler, NOW + 1.0) == [], "a report is no reason to start it"
    scheduler.note_first_token(first, NOW + LOAD_S)
    assert grants(scheduler, NOW + LOAD_S + 30.0) == [("b", "n")]


def test_a_model_that_was_just_loaded_has_its_time_although_nothing_happens_then() -> None:
    """The other model waits for a time that no event announces."""
    scheduler = make_scheduler()
    make_node(scheduler, "n", loaded=(), slots=3)
    ask_often(scheduler, KEY_A)
    first, running = place(scheduler, ask(A)), place(scheduler, ask(A))
    for placed in (first, running):
        scheduler.note_first_token(placed, NOW + LOAD_S)
    scheduler.end(first, NOW + LOAD_S + 1.0)
    scheduler.grants(NOW + LOAD_S + 1.0)
    now = NOW + LOAD_S + 2.0
    send_waiting(scheduler, "b", ask(B), now)
    granted = grants(scheduler, now)
    while not granted:
        check_at = scheduler.next_check()
        assert check_at is not None, "nobody would look again"
        assert now < check_at < NOW + 60.0
        now = check_at
        granted = grants(scheduler, now)
    assert granted == [("b", "n")]


def test_who_waits_next_is_asked_when_the_first_has_gone() -> None:
    """The client of the first request leaves, and nothing else happens."""
    scheduler, _, _ = make_two_models()
    start(scheduler, ask_long(scheduler, 500))
    first = send_waiting(scheduler, "first")
    second = send_waiting(scheduler, "second")
    assert grants(scheduler, NOW) == []
    second.payload.patience_until = None
    scheduler.queue.discard(first)
    now = NOW
    while second in scheduler.queue:
        check_at = scheduler.next_check()
        assert check_at is not None, "nobody would look again"
        assert now < check_at < NOW + 60.0
        now = check_at
        scheduler.grants(now)


# -- prefixes ----------------------------------------------------------------------------------------------------------


def prompt_of(name: str, blocks: int = 20, tail: int = 0) -> PromptPrint:
    """A prompt of so many blocks; the last ``tail`` of them are its own."""
    shared = tuple(hash((name, number)) for number in range(blocks - tail))
    own = tuple(hash((name, "own", number)) for number in range(tail))
    return PromptPrint(shared + own, 16_000)


def chat_with(prompt: PromptPrint) -> Demand:
    return Demand(A, max_tokens=20, prompt_tokens=4000, residency=KEY_A, prompt=prompt)


def serve(scheduler: Scheduler, demand: Demand, now: float) -> str:
    placed = start(scheduler, demand, now)
    scheduler.end(placed, now + 1.0)
    scheduler.grants(now + 1.0)
    return placed.account.name


def test_a_conversation_follows_its_prompt() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        make_node(scheduler, name, slots=4)
    first = serve(scheduler, chat_with(prompt_of("x")), NOW)
    for number in range(6):
        assert serve(scheduler, chat_with(prompt_of("x", 21 + number)), NOW + 10.0 * number + 10.0) == first


@pytest.mark.parametrize("prompt", [None, prompt_of("x", 2)])
def test_a_named_conversation_stays_where_it_was_from_its_first_words_on(prompt: PromptPrint | None) -> None:
    """A prompt of less than a block has no print, and the size of one of a few blocks is not known."""
    scheduler = make_scheduler()
    for name in "abc":
        make_node(scheduler, name, slots=4)
    short = Demand(A, max_tokens=20, residency=KEY_A, session=7, prompt=prompt)
    first = serve(scheduler, short, NOW)
    for number in range(6):
        serve(scheduler, ask(), NOW + 10.0 * number + 5.0)  # so that equal nodes are rotated
        assert serve(scheduler, short, NOW + 10.0 * number + 10.0) == first
    assert serve(scheduler, Demand(A, max_tokens=20, residency=KEY_A, session=7, prompt=prompt_of("y")), NOW) == first
    others = [replace(short, session=number, prompt=None) for number in (8, 9, 10)]
    assert {serve(scheduler, other, NOW + 100.0) for other in others} == set("abc")


def test_conversations_spread_over_the_nodes() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        make_node(scheduler, name, slots=4)
    nodes = [serve(scheduler, chat_with(prompt_of(f"chat {number}")), NOW + number) for number in range(9)]
    assert {nodes.count(name) for name in "abc"} == {3}


def test_a_prompt_is_read_elsewhere_when_the_node_that_has_it_is_busy_for_longer() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        make_node(scheduler, name)
    first = serve(scheduler, chat_with(prompt_of("x")), NOW)
    start(scheduler, ask_long(scheduler, 6000, node=first), NOW + 10.0)  # 60 s
    assert start(scheduler, chat_with(prompt_of("x", 21)), NOW + 11.0).account.name != first


def test_a_prompt_whose_node_is_free_in_a_moment_waits_for_it() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        make_node(scheduler, name)
    first = serve(scheduler, chat_with(prompt_of("x")), NOW)
    running = start(scheduler, ask(tokens=50, node=first), NOW + 10.0)  # 0.5 s, where reading takes 4 s
    entry = send(scheduler, "next", chat_with(prompt_of("x", 21)), NOW + 10.0)
    assert isinstance(entry, QueueEntry)
    scheduler.end(running, NOW + 10.5)
    assert grants(scheduler, NOW + 10.5) == [("next", first)]


def test_of_nodes_that_cost_about_the_same_the_one_with_the_prompt_serves() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "cached", slots=4)
    make_node(scheduler, "quick", slots=4, speed=2.65)  # reads 4,000 tokens as quickly as the other one 1,440
    prompt = prompt_of("x")
    for number in range(6):  # nodes that are equal are rotated
        scheduler.experience.prefixes.forget("quick")
        scheduler.experience.prefixes.add("cached", KEY_A, prompt, NOW)
        assert serve(scheduler, chat_with(prompt), NOW + 10.0 * number) == "cached"


def test_a_short_wait_is_worth_the_reading_that_it_saves() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        make_node(scheduler, name)
    prompt = prompt_of("x", 4)  # 512 of 700 tokens: 0.5 s
    scheduler.experience.prefixes.add("a", KEY_A, prompt, NOW)
    demand = Demand(A, max_tokens=20, prompt_tokens=700, residency=KEY_A, prompt=prompt)
    running = start(scheduler, ask(tokens=10, node="a"))  # 0.1 s
    assert isinstance(send(scheduler, "next", demand), QueueEntry)
    scheduler.end(running, NOW + 0.1)
    [(entry, placement)] = scheduler.grants(NOW + 0.1)
    assert (entry.payload.payload, placement.placed.account.name) == ("next", "a")
    scheduler.end(placement.placed, NOW + 1.0)
    start(scheduler, ask(tokens=60, node="a"), NOW + 1.0)  # 0.6 s
    assert start(scheduler, demand, NOW + 1.0).account.name == "b"


def test_a_conversation_that_must_move_goes_where_it_displaces_no_other() -> None:
    scheduler = make_scheduler()
    for name, slots in (("owner", 1), ("full", 8), ("roomy", 8)):
        make_node(scheduler, name, slots=slots)
    prefixes, number = scheduler.experience.prefixes, 0
    while not prefixes.displaced_bytes("full", KEY_A):
        prefixes.add("full", KEY_A, prompt_of(f"other {number}"), NOW)
        number += 1
    prefixes.add("owner", KEY_A, prompt_of("x"), NOW)
    start(scheduler, ask_long(scheduler, 6000, node="owner"))  # 60 s
    for number in range(4):
        scheduler.end(start(scheduler, ask(tokens=1, node="full")), NOW)  # so that equal nodes are rotated
        prefixes.forget("roomy")
        assert serve(scheduler, chat_with(prompt_of("x", 21)), NOW + 1.0 + number) == "roomy"


# -- tiers and preferences ---------------------------------------------------------------------------------------------


def test_a_lower_tier_serves_while_the_upper_is_away_and_no_longer() -> None:
    scheduler = make_scheduler()
    own, rented = make_node(scheduler, "own", tier=1), make_node(scheduler, "rented", tier=2, speed=1.5)
    own.is_up = False
    scheduler.end(start(scheduler), NOW)
    assert rented.in_flight == 0
    own.is_up = True
    scheduler.note_report(own)
    assert all(serve(scheduler, ask(), NOW + number) == "own" for number in range(4))


def test_a_node_of_a_lower_tier_that_is_a_little_faster_is_neither_used_nor_awaited() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "own", tier=1, speed=0.4)
    make_node(scheduler, "rented", tier=2)
    assert serve(scheduler, ask(tokens=250), NOW) == "own"


def test_a_much_faster_node_of_a_lower_tier_serves() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "old", tier=1, speed=0.05)
    make_node(scheduler, "new", tier=2)
    assert serve(scheduler, ask(), NOW) == "new"


def test_requests_that_wait_take_the_upper_tier_too_when_all_nodes_come_back_at_once() -> None:
    scheduler = make_scheduler()
    nodes = [make_node(scheduler, name, tier=tier) for name, tier in (("rented", 2), ("own", 1))]
    for node in nodes:
        node.is_up = False
    send_waiting(scheduler, "first")
    for node in nodes:
        node.is_up = True
        scheduler.note_report(node)
    assert grants(scheduler, NOW + 1.0) == [("first", "own")]


def test_a_waiting_request_takes_the_preferred_node_when_all_come_back_at_once() -> None:
    scheduler = make_scheduler()
    nodes = [make_node(scheduler, name) for name in ("other", "preferred")]
    for node in nodes:
        node.is_up = False
    send_waiting(scheduler, "first", ask(preferred_nodes=frozenset({"preferred"})))
    for node in nodes:
        node.is_up = True
        scheduler.note_report(node)
    assert grants(scheduler, NOW + 1.0) == [("first", "preferred")]


# -- what a request leaves behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_after_the_last_request_nothing_is_left(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    for name in "ab":
        make_node(scheduler, name, slots=2)
    running = [start(scheduler, ask(model, tokens=tokens)) for model, tokens in ((A, 10), (A, 20), (B, 30))]
    for placed in running:
        scheduler.end(placed, NOW + 1.0)
        scheduler.end(placed, NOW + 2.0)
    for account in scheduler.accounts.values():
        assert (account.in_flight, account.streams, account.activity.reading, account.placed_by_model) == (0, 0, 0, {})


def test_a_node_that_fails_a_request_is_left_out_and_the_request_keeps_its_place() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "bad")
    good = make_node(scheduler, "good")
    running = start(scheduler, ask(node="good"))
    entry = scheduler.wait(ask(), NOW + 0.2, "moved", exclude=frozenset({"bad"}), accepted_at=NOW - 5.0)
    later = scheduler.wait(ask(node="good"), NOW + 0.1, "later")
    assert entry.queued_at < later.queued_at
    scheduler.end(running, NOW + 1.0)
    assert grants(scheduler, NOW + 1.0) == [("moved", "good")]
    assert good.in_flight == 1
