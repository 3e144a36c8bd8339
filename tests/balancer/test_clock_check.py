"""A server whose clock lies is measured by our own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.clock_check import LEAST_MS, correct_durations
from tests.balancer.scheduling.fleets import NOW, ask, make_node, make_scheduler

RTT_S = 0.1
HONEST = ServerCounters(prompt_tokens=100, tokens=100, total_ms=2000.0, load_ms=100.0, prompt_ms=400.0, eval_ms=1500.0)


def place() -> PlacedRequest:
    scheduler = make_scheduler()
    make_node(scheduler, "n").rtt_s = RTT_S
    placement = scheduler.place_now(ask(), NOW)
    assert placement is not None
    return placement.placed


def lie(factor: float) -> ServerCounters:
    total_ms, load_ms, prompt_ms, eval_ms = (factor * value for value in (2000.0, 100.0, 400.0, 1500.0))
    return ServerCounters(100, 100, total_ms, load_ms, prompt_ms, eval_ms)


def test_what_can_be_true_is_believed() -> None:
    placed = place()
    for took_s in (1.9, 2.0, 2.5, 3.4):
        assert correct_durations(HONEST, placed, NOW + RTT_S + took_s) is HONEST


@pytest.mark.parametrize("factor", [0.01, 0.3, 1.5, 100.0])
def test_a_clock_at_another_rate_is_corrected(factor: float) -> None:
    corrected = correct_durations(lie(factor), place(), NOW + RTT_S + 2.0)
    for name in ("total_ms", "load_ms", "prompt_ms", "eval_ms"):
        assert getattr(corrected, name) == pytest.approx(getattr(HONEST, name))
    assert (corrected.tokens, corrected.prompt_tokens) == (100, 100)


def test_the_time_of_a_slow_client_is_no_time_of_the_server() -> None:
    placed = place()
    placed.had_slow_client = True
    assert correct_durations(HONEST, placed, NOW + 60.0) is HONEST
    assert correct_durations(lie(100.0), placed, NOW + RTT_S + 2.0).eval_ms == pytest.approx(1500.0)


def test_without_a_total_only_durations_that_are_too_long_are_seen() -> None:
    parts = ServerCounters(tokens=100, prompt_ms=400.0, eval_ms=1600.0)
    assert correct_durations(parts, place(), NOW + 60.0) is parts
    corrected = correct_durations(parts, place(), NOW + RTT_S + 1.0)
    assert corrected.prompt_ms == pytest.approx(200.0)
    assert corrected.eval_ms == pytest.approx(800.0)
    assert correct_durations(ServerCounters(), place(), NOW + 1.0) == ServerCounters()


def test_the_generation_cannot_be_shorter_than_the_text_came() -> None:
    placed = place()
    placed.first_token_at = NOW + RTT_S + 0.5
    end = NOW + RTT_S + 2.0
    assert correct_durations(HONEST, placed, end) is HONEST
    shifted = ServerCounters(100, 100, total_ms=2000.0, load_ms=100.0, prompt_ms=1885.0, eval_ms=15.0)
    corrected = correct_durations(shifted, placed, end)
    assert corrected.eval_ms == pytest.approx(1500.0)
    assert corrected.prompt_ms == pytest.approx(400.0)
    placed.had_slow_client = True
    assert correct_durations(shifted, placed, end) is shifted, "the text came so slowly because of the client"


def test_text_that_was_collected_on_the_way_does_not_make_the_generation_shorter() -> None:
    placed = place()
    placed.first_token_at = NOW + RTT_S + 1.99
    assert correct_durations(HONEST, placed, NOW + RTT_S + 2.0) is HONEST


durations = st.none() | st.floats()


@given(total_ms=durations, prompt_ms=durations, eval_ms=durations, took_s=st.floats(0.0, 1e6))
def test_no_figures_break_it(
    total_ms: float | None, prompt_ms: float | None, eval_ms: float | None, took_s: float
) -> None:
    counters = ServerCounters(total_ms=total_ms, prompt_ms=prompt_ms, eval_ms=eval_ms)
    corrected = correct_durations(counters, place(), NOW + took_s)
    if total_ms is not None and total_ms < LEAST_MS:
        assert corrected is counters, "no figure at all"
    elif total_ms is not None and corrected is not counters and math.isfinite(total_ms):
        assert corrected.total_ms == pytest.approx(max(took_s - RTT_S, 0.0) * 1000.0, abs=0.01)
