"""Rates of servers that give no durations, by our own clock."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.topology import BackendKind, PolicyKind

MODEL = "meta-llama/Llama-3.1-8B-Instruct:latest"
DEMAND = Demand(MODEL, residency=ResidencyKey(MODEL), prompt_tokens=2000, max_tokens=100)


def make_scheduler(kind: BackendKind = BackendKind.OPENAI) -> Scheduler:
    scheduler = Scheduler(PolicyKind.ADAPTIVE, rng=Random(1), max_queue=100)
    account = scheduler.roster.add("vllm", max_parallel=8)
    account.kind, account.is_up, account.models = kind, True, frozenset({MODEL})
    account.residency.is_tracked = False
    scheduler.note_report(account)
    return scheduler


def place(scheduler: Scheduler, now: float) -> PlacedRequest:
    placement = scheduler.place_now(DEMAND, now)
    assert placement is not None
    return placement.placed


def answer(
    scheduler: Scheduler, now: float, counters: ServerCounters, *, token_s: float = 0.02, slow_client: bool = False
) -> float:
    """One answer of 101 tokens, after half a second of reading. Returns the time of its end."""
    placed = place(scheduler, now)
    scheduler.note_first_token(placed, now + 0.5)
    placed.had_slow_client = slow_client
    end = now + 0.5 + 100 * token_s
    scheduler.end(placed, end, counters)
    return end


@pytest.mark.parametrize("prompt_tokens", [2000, None])
def test_rates_are_learned_without_durations(prompt_tokens: int | None) -> None:
    scheduler = make_scheduler()
    now = 10.0
    for _ in range(20):
        now = answer(scheduler, now, ServerCounters(tokens=101, prompt_tokens=prompt_tokens)) + 1.0
    rates = scheduler.accounts["vllm"].rates
    assert rates.decode_s(MODEL, 100) == pytest.approx(2.0, rel=0.05)
    assert rates.prefill_s(MODEL, 2000) == pytest.approx(0.5, rel=0.1)


def test_streams_at_the_same_time_are_taken_into_account() -> None:
    """Four streams together take 1.6 times as long; alone, a token takes 20 ms."""
    scheduler = make_scheduler()
    now = 10.0
    counters = ServerCounters(tokens=101, prompt_tokens=2000)
    for _ in range(40):
        now = answer(scheduler, now, counters) + 1.0
        group = [place(scheduler, now) for _ in range(4)]
        for placed in group:
            scheduler.note_first_token(placed, now + 1.0)
        now += 1.0 + 100 * 0.02 * 1.6
        for placed in group:
            scheduler.end(placed, now, counters)
        now += 1.0
    rates = scheduler.accounts["vllm"].rates
    assert rates.decode_s(MODEL, 100) == pytest.approx(2.0, rel=0.1)
    assert rates.decode_s(MODEL, 100, 4) == pytest.approx(3.2, rel=0.1)


def test_a_slow_client_a_short_answer_and_one_in_one_piece_teach_no_rate() -> None:
    scheduler = make_scheduler()
    answer(scheduler, 10.0, ServerCounters(tokens=101), slow_client=True)
    answer(scheduler, 20.0, ServerCounters(tokens=5))
    placed = place(scheduler, 30.0)
    scheduler.end(placed, 35.0, ServerCounters(tokens=101))
    answer(scheduler, 40.0, ServerCounters())
    assert not scheduler.accounts["vllm"].rates.is_measured(MODEL)


def test_the_servers_own_durations_come_before_our_clock() -> None:
    scheduler = make_scheduler()
    counters = ServerCounters(tokens=101, prompt_tokens=2000, eval_ms=1000.0, prompt_ms=100.0)
    now = 10.0
    for _ in range(10):
        now = answer(scheduler, now, counters) + 1.0
    assert scheduler.accounts["vllm"].rates.decode_s(MODEL, 101) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("frames", "tokens"), [(103, 100), (3, None), (0, None)])
def test_frames_stand_for_tokens_where_the_server_counts_none(frames: int, tokens: int | None) -> None:
    assert ServerCounters().with_frame_count(frames).tokens == tokens
    assert ServerCounters(tokens=7).with_frame_count(frames).tokens == 7


WHOLE = msgspec.structs.replace(DEMAND, is_whole_text=True)


def answer_together(
    scheduler: Scheduler,
    now: float,
    streams: int,
    *,
    seconds: float,
    demand: Demand = WHOLE,
    eval_ms: float | None = None,
    prompt_ms: float | None = None,
) -> float:
    """So many answers of 101 tokens in one piece, that are sent and that end together. Returns the time of their
    end."""
    all_placed = []
    for _ in range(streams):
        placement = scheduler.place_now(demand, now)
        assert placement is not None
        all_placed.append(placement.placed)
    for placed in all_placed:
        scheduler.end(
            placed, now + seconds, ServerCounters(tokens=101, prompt_tokens=2000, eval_ms=eval_ms, prompt_ms=prompt_ms)
        )
    return now + seconds


def test_texts_in_one_piece_that_are_written_together_are_taken_into_account() -> None:
    """A token takes 20 ms alone, and 32 ms among four streams. Nobody sees when these begin."""
    scheduler = make_scheduler()
    rates = scheduler.accounts["vllm"].rates
    now = 10.0
    for number in range(40):
        streams, token_s = (4, 0.032) if number % 2 else (1, 0.02)
        eval_ms = 101_000 * token_s
        now = 1.0 + answer_together(
            scheduler, now, streams, seconds=eval_ms / 1000 + 0.1, eval_ms=eval_ms, prompt_ms=100.0
        )
    assert rates.decode_s(MODEL, 100) == pytest.approx(2.0, rel=0.07)
    assert rates.decode_s(MODEL, 100, 4.0) == pytest.approx(3.2, rel=0.07)


def test_running_texts_in_one_piece_do_not_look_like_prompts_that_are_read() -> None:
    scheduler = make_scheduler()
    account = scheduler.accounts["vllm"]
    now = 10.0
    for _ in range(30):
        now = answer_together(scheduler, now, 2, seconds=2.0)
    assert account.activity.read_share(now) == 0.0
    assert (account.streams, account.activity.reading) == (0, 0)


def test_the_rate_of_texts_in_one_piece_without_durations_is_learned_by_the_clock() -> None:
    scheduler = make_scheduler()
    account = scheduler.accounts["vllm"]
    now = 10.0
    short = msgspec.structs.replace(WHOLE, prompt_tokens=None)
    for _ in range(40):
        now = answer_together(scheduler, now, 1, seconds=4.0, demand=short) + 1.0
    assert account.rates.decode_s(MODEL, 100) == pytest.approx(4.0, rel=0.02)
