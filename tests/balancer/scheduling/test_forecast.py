"""Each part of a forecast, against a calculation by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.forecast import (
    COPY_HORIZON_S,
    FOREIGN_SHARE,
    LEAST_STAY,
    PINNED_COST_S,
    READ_DELAY,
    RELOAD_HORIZON_S,
    RETURN_SHARE,
    Forecast,
    forecast,
    mean_wait_s,
    place_on,
)
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.balancer.work import Work
from gpumesh.topology import BackendKind
from tests.balancer.scheduling.fleets import (
    KEY_A,
    KEY_B,
    LOAD_S,
    NOW,
    READ_S,
    SHARE,
    TOKEN_S,
    A,
    B,
    C,
    make_node,
    make_scheduler,
)

WORK = Work(prompt_tokens=200.0, answer_tokens=100.0)
OWN_READ_S, ALONE_S = 200 * READ_S, 100 * TOKEN_S


def look(
    scheduler: Scheduler,
    account: NodeAccount,
    key: ResidencyKey = KEY_A,
    work: Work = WORK,
    *,
    queue_s: float = 0.0,
    now: float = NOW,
    prompt: PromptPrint | None = None,
) -> Forecast:
    demand = Demand(key.model, residency=key, prompt=prompt)
    return forecast(account, demand, work, scheduler._fleet, queue_s, now)


def place(
    scheduler: Scheduler, account: NodeAccount, key: ResidencyKey = KEY_A, work: Work = WORK, now: float = NOW
) -> PlacedRequest:
    found = look(scheduler, account, key, work, now=now)
    placed = place_on(account, Demand(key.model, residency=key), work, found, now)
    scheduler._fleet.copies.update(account)
    return placed


def start_stream(scheduler: Scheduler, account: NodeAccount, tokens: float) -> None:
    """An answer of so many tokens begins to be written on the node now."""
    placed = place(scheduler, account, work=Work(1.0, tokens))
    account.note_first_token(placed, NOW)


def ask_for(scheduler: Scheduler, key: ResidencyKey, *, per_s: float, service_s: float = 2.0) -> float:
    """Lets the key have been asked for so often in the last minutes. Returns the rate that was seen."""
    demands = scheduler._fleet.demands
    for number in range(int(300 * per_s)):
        demands.note_request(key, NOW - 300.0 + number / per_s)
    demands.note_service(key, service_s)
    return demands.rate(key, NOW)


# -- a node that has the model -----------------------------------------------------------------------------------------


def test_an_idle_node_that_has_the_model() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n")
    node.rtt_s = 0.05
    found = look(scheduler, node)
    assert found.is_free
    assert (found.way_s, found.wait_s, found.load_s, found.evicted_s) == (0.05, 0.0, 0.0, 0.0)
    assert found.read_s == found.own_read_s == pytest.approx(OWN_READ_S)
    assert found.write_s == pytest.approx(ALONE_S)
    assert found.others_s == pytest.approx(READ_DELAY * OWN_READ_S)
    assert found.own_s == pytest.approx(0.05 + OWN_READ_S + ALONE_S)
    assert found.total_s == pytest.approx(found.own_s + found.others_s)


def test_what_the_server_has_in_its_cache_is_not_read() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n")
    found = look(scheduler, node, work=Work(200.0, 100.0, {"n": 150.0, "other": 10.0}))
    assert found.unread_tokens == 50.0
    assert found.read_s == pytest.approx(50 * READ_S)
    found = look(scheduler, node, work=Work(200.0, 100.0, {"n": 500.0}))
    assert found.unread_tokens == 1.0, "the last token is always read"


def test_weight_foreign_load_and_slowness_change_the_speed() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", weight=2.0)
    assert look(scheduler, node).write_s == pytest.approx(ALONE_S / 2.0)
    node.foreign_load = 0.8
    assert look(scheduler, node).write_s == pytest.approx(ALONE_S / 2.0 / (1.0 - FOREIGN_SHARE * 0.8))
    node.foreign_load, node.slowness = 0.0, 3.0
    found = look(scheduler, node)
    assert found.write_s == pytest.approx(ALONE_S / 2.0 * 3.0)
    assert found.read_s == pytest.approx(OWN_READ_S / 2.0 * 3.0)


def test_another_stream_slows_the_answer_and_is_slowed_by_it() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4)
    start_stream(scheduler, node, 400.0)  # for 4 s
    found = look(scheduler, node)
    write_s = ALONE_S * (1.0 + SHARE)
    assert found.write_s == pytest.approx(write_s)
    # The other answer stands still while the prompt is read, and then takes 1.25 times as long for 1.25 s.
    stall = node.read_stall.value  # nearly
    assert found.others_s == pytest.approx(READ_DELAY * OWN_READ_S + stall * OWN_READ_S + write_s * SHARE)


def test_a_prompt_that_is_read_counts_as_the_stream_that_it_will_be() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4)
    place(scheduler, node)
    found = look(scheduler, node)
    write_s = ALONE_S * (1.0 + SHARE)
    assert found.write_s == pytest.approx(write_s)
    stall = node.read_stall.value
    assert found.others_s == pytest.approx(READ_DELAY * OWN_READ_S + stall * OWN_READ_S + write_s * SHARE)


def test_another_stream_is_delayed_only_until_it_ends() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4)
    start_stream(scheduler, node, 40.0)  # for 0.4 s
    others_s = look(scheduler, node).others_s
    stall = node.read_stall.value
    assert others_s == pytest.approx(READ_DELAY * OWN_READ_S + stall * OWN_READ_S + 0.4 * SHARE)


def test_a_node_that_often_reads_writes_slower_and_makes_others_wait_more_for_a_prompt() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4)
    for number in range(100):
        placed = place(scheduler, node, work=Work(1000.0, 1.0), now=NOW + number)
        node.note_first_token(placed, NOW + number + 0.5)
        node.remove(placed, NOW + number + 0.5)
    now = NOW + 100.0
    reading = node.activity.read_share(now)
    assert reading == pytest.approx(0.5, abs=0.1)
    found = look(scheduler, node, now=now)
    assert found.write_s == pytest.approx(ALONE_S / (1.0 - node.read_stall.value * reading))
    assert found.others_s == pytest.approx(OWN_READ_S * (READ_DELAY + reading / (1.0 - reading)))


def test_prompts_that_were_sent_before_are_read_before() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4)
    place(scheduler, node, work=Work(1000.0, 100.0))  # 1 s to read
    assert look(scheduler, node).read_s == pytest.approx(OWN_READ_S + 1.0)
    assert look(scheduler, node, now=NOW + 0.75).read_s == pytest.approx(OWN_READ_S + 0.25)


def test_a_full_node_has_a_wait_for_its_slot_and_for_the_queue() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=1)
    start_stream(scheduler, node, 300.0)  # for 3 s
    found = look(scheduler, node, queue_s=5.0)
    assert not found.is_free
    assert found.wait_s == pytest.approx(3.0 + 5.0)
    node.max_parallel = 2
    found = look(scheduler, node, queue_s=5.0)
    assert found.is_free
    assert found.wait_s == 0.0


# -- a node that must load it ------------------------------------------------------------------------------------------


def test_an_idle_node_without_the_model_loads_it() -> None:
    scheduler = make_scheduler()
    found = look(scheduler, make_node(scheduler, "n", loaded=(B,)))
    assert found.is_free
    assert found.load_s == pytest.approx(LOAD_S)
    assert list(found.pushed_out) == [B]
    assert found.evicted_s == 0.0, "nobody asks for it"
    assert found.total_s == pytest.approx(found.own_s + found.others_s)


def test_a_server_that_loads_nothing_never_loads() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=())
    node.residency.is_tracked = False
    assert look(scheduler, node).load_s == 0.0


def test_what_runs_on_a_model_that_must_go_is_awaited() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=(A,))
    start_stream(scheduler, node, 700.0)  # for 7 s
    assert look(scheduler, node, KEY_B).load_s == pytest.approx(7.0 + LOAD_S)


def test_other_options_of_the_same_model_wait_for_its_requests_too() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded={A: 4096}, single=False)
    start_stream(scheduler, node, 700.0)
    found = look(scheduler, node, ResidencyKey(A, 8192))
    assert list(found.pushed_out) == [A]
    assert found.load_s == pytest.approx(7.0 + LOAD_S)


def test_a_model_that_fits_pushes_out_nothing_and_waits_for_nobody() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=(A,), single=False)
    start_stream(scheduler, node, 700.0)
    found = look(scheduler, node, KEY_B)
    assert list(found.pushed_out) == []
    assert found.load_s == pytest.approx(LOAD_S)


def test_a_model_that_loads_already_is_awaited_for_the_rest_of_its_load() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=())
    place(scheduler, node, work=Work(1.0, 100.0))
    found = look(scheduler, node, now=NOW + 1.0)
    assert found.is_free
    assert found.load_s == pytest.approx(LOAD_S - 1.0)
    assert look(scheduler, node, now=NOW + LOAD_S + 1.0).load_s == 0.0


def test_prompts_that_are_read_during_the_load_are_not_counted_twice() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=())
    place(scheduler, node, work=Work(1000.0, 100.0))  # read in the second after the load
    found = look(scheduler, node)
    assert found.load_s + found.read_s == pytest.approx(LOAD_S + 1.0 + OWN_READ_S)


def test_a_further_load_waits_for_the_first() -> None:
    """A server loads one model at a time; the requests for which it loads now are served before."""
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=(), single=False)
    placed = place(scheduler, node, KEY_B)
    found = look(scheduler, node, now=NOW + 1.0)
    assert not found.is_free
    assert found.wait_s == pytest.approx(LOAD_S - 1.0)
    assert found.load_s == pytest.approx(LOAD_S)
    node.note_first_token(placed, NOW + 2.0)
    assert look(scheduler, node, now=NOW + 2.0).is_free


# -- what a load costs those who come later ----------------------------------------------------------------------------


def test_to_push_out_the_last_copy_of_a_model_costs_its_reload() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=(B,))
    rate = ask_for(scheduler, KEY_B, per_s=0.5)
    will_be_asked = 1.0 - math.exp(-rate * RELOAD_HORIZON_S)
    expected = will_be_asked * LOAD_S * (1.0 + rate * LOAD_S / 2.0)  # who comes in the time of the load waits too
    assert look(scheduler, node).evicted_s == pytest.approx(expected)


def test_to_push_out_one_of_several_copies_costs_the_longer_wait_for_the_others() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=(B,))
    make_node(scheduler, "other", loaded=(B,), slots=2)
    rate = ask_for(scheduler, KEY_B, per_s=0.2, service_s=2.0)
    expected = rate * COPY_HORIZON_S * (mean_wait_s(rate, 2.0, 2) - mean_wait_s(rate, 2.0, 3))
    found = look(scheduler, node)
    assert found.evicted_s == pytest.approx(expected)
    scheduler.accounts["other"].is_up = False
    scheduler.note_report(scheduler.accounts["other"])
    assert look(scheduler, node).evicted_s > expected, "a copy on a node that is away serves nobody"


def test_a_copy_with_other_options_is_no_copy() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded={B: 4096})
    make_node(scheduler, "other", loaded={B: 8192})
    ask_for(scheduler, ResidencyKey(B, 4096), per_s=0.5)
    assert look(scheduler, node).evicted_s > LOAD_S


def test_one_more_copy_of_a_busy_model_is_worth_something() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=(B,))
    make_node(scheduler, "hot", loaded=(A,))
    ask_for(scheduler, KEY_B, per_s=0.05)
    without = look(scheduler, node).evicted_s
    rate = ask_for(scheduler, KEY_A, per_s=0.4, service_s=2.0)
    gain = rate * COPY_HORIZON_S * (mean_wait_s(rate, 2.0, 1) - mean_wait_s(rate, 2.0, 2))
    assert gain > 0.0
    assert look(scheduler, node).evicted_s == pytest.approx(max(without - gain, 0.0))


def test_a_model_stays_until_its_load_has_paid_off_if_it_is_asked_for_and_used() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=(), slots=2)
    placed = place(scheduler, node, KEY_B, work=Work(1.0, 1.0))
    node.note_first_token(placed, NOW)
    stays_s = LEAST_STAY * LOAD_S
    assert look(scheduler, node).is_free, "nobody else asks for B"
    ask_for(scheduler, KEY_B, per_s=0.1)
    found = look(scheduler, node)
    assert not found.is_free
    assert found.wait_s == pytest.approx(stays_s)
    assert look(scheduler, node, now=NOW + stays_s).is_free
    node.remove(placed, NOW)
    assert look(scheduler, node).is_free, "an idle node need not wait"


def test_a_pinned_model_is_pushed_out_only_if_nothing_else_can_serve() -> None:
    scheduler = make_scheduler(pinned=[B])
    pinned, other = make_node(scheduler, "pinned", loaded=(B,)), make_node(scheduler, "other", loaded=(C,))
    assert look(scheduler, pinned).evicted_s >= PINNED_COST_S
    assert look(scheduler, other).evicted_s == 0.0


def test_a_prompt_whose_beginning_is_elsewhere_takes_the_place_of_another_here() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4)
    prefixes, number = scheduler.experience.prefixes, 0
    while not prefixes.displaced_bytes("n", KEY_A):
        number += 1
        prefixes.add("n", KEY_A, PromptPrint((number,), 4000), NOW)
    new = PromptPrint((0,), 4000)
    assert look(scheduler, node, prompt=new).evicted_s == 0.0, "no other node has it"
    found = look(scheduler, node, work=Work(1000.0, 100.0, {"other": 900.0}), prompt=new)
    assert found.evicted_s == pytest.approx(RETURN_SHARE * 1000 * READ_S)  # 4,000 bytes
    found = look(scheduler, node, work=Work(1000.0, 100.0, {"n": 900.0, "other": 900.0}), prompt=new)
    assert found.evicted_s == 0.0


# -- the wait for slots ------------------------------------------------------------------------------------------------


def erlang_wait_s(rate: float, service_s: float, slots: int) -> float:
    """The exact mean wait of an M/M/c queue, by Erlang's C formula."""
    load = rate * service_s
    last = load**slots / math.factorial(slots) * slots / (slots - load)
    waits = last / (sum(load**k / math.factorial(k) for k in range(slots)) + last)
    return waits * service_s / (slots - load)


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
@pytest.mark.parametrize("busy", [0.5, 0.7, 0.9])
def test_the_mean_wait_is_about_that_of_erlangs_formula(slots: int, busy: float) -> None:
    rate = busy * slots / 3.0
    assert mean_wait_s(rate, 3.0, slots) == pytest.approx(erlang_wait_s(rate, 3.0, slots), rel=0.25, abs=0.1)


def test_the_mean_wait_is_finite_however_many_come() -> None:
    assert mean_wait_s(0.0, 3.0, 1) == 0.0
    assert mean_wait_s(1000.0, 3.0, 1) == mean_wait_s(2000.0, 3.0, 1) < math.inf


# -- placing -----------------------------------------------------------------------------------------------------------


def test_a_placed_request_is_expected_to_begin_and_end_as_forecast() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", loaded=(B,))
    node.rtt_s = 0.05
    placed = place(scheduler, node)
    assert placed.needs_load
    assert placed.drain_s == 0.0
    assert placed.begins_at == pytest.approx(NOW + 0.05 + LOAD_S + OWN_READ_S)
    assert placed.ends_at == pytest.approx(placed.begins_at + ALONE_S)
    assert node.residency.is_resident(KEY_A)
    assert not node.residency.is_resident(KEY_B)


def test_a_request_that_comes_during_the_load_needs_it_but_does_not_start_it() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=())
    place(scheduler, node)
    placed = place(scheduler, node, now=NOW + 1.0)
    assert placed.needs_load
    assert placed.drain_s is None


def test_the_drain_before_a_load_is_kept_apart() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=4, loaded=(A,))
    start_stream(scheduler, node, 700.0)
    assert place(scheduler, node, KEY_B).drain_s == pytest.approx(7.0)


figures = st.floats(0.0, 1e6) | st.sampled_from([0.0, 5e-324, 1e-300, 1e9])

answers = st.floats(1.0, 1e6)  # ``Experience`` expects at least one token


@given(
    key=st.builds(ResidencyKey, st.sampled_from([A, B, "x:latest"]), st.sampled_from([None, 8192]), st.just(())),
    running=st.lists(st.tuples(st.sampled_from([A, B, C]), figures, answers, st.booleans()), max_size=5),
    foreign=st.floats(),
    rtt_s=figures,
    memory_mib=st.none() | st.integers(0, 1 << 40),
    work=st.builds(Work, figures, answers, st.dictionaries(st.sampled_from(["n", "other"]), figures)),
    queue_s=figures,
    later_s=figures,
)
def test_the_parts_are_finite_and_make_the_sum_whatever_the_node_tells(
    key: ResidencyKey,
    running: list[tuple[str, float, float, bool]],
    foreign: float,
    rtt_s: float,
    memory_mib: int | None,
    work: Work,
    queue_s: float,
    later_s: float,
) -> None:
    scheduler = make_scheduler(pinned=[C])
    node = make_node(scheduler, "n", slots=3)
    make_node(scheduler, "other", loaded=(B,))
    node.kind, node.foreign_load, node.rtt_s, node.residency.memory_mib = BackendKind.AUTO, foreign, rtt_s, memory_mib
    for model, prompt, tokens, has_begun in running:
        ask_for(scheduler, ResidencyKey(model), per_s=0.1)
        placed = place(scheduler, node, ResidencyKey(model), Work(prompt, tokens))
        if has_begun:
            node.note_first_token(placed, NOW)
    found = look(scheduler, node, key, work, queue_s=queue_s, now=NOW + later_s)
    parts = (
        found.way_s,
        found.wait_s,
        found.load_s,
        found.read_s,
        found.write_s,
        found.others_s,
        found.evicted_s,
    )
    assert all(0.0 <= part < math.inf for part in parts)
    assert found.total_s == pytest.approx(sum(parts))
    assert found.unread_tokens >= 1.0
    assert not (found.is_free and found.wait_s)
    assert not (found.is_free and len(running) >= 3)
