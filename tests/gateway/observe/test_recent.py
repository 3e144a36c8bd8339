"""What clients felt in the last minutes, and the last lines of the log."""

from __future__ import annotations

import logging

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.gateway.observe.recent_figures import WINDOW_S, RecentFigures
from gpumesh.gateway.observe.recent_log import MAX_LINES, MAX_MESSAGE_CHARS, RecentLog
from gpumesh.mesh.request_counters import RequestCounters


def test_figures_are_those_of_the_window() -> None:
    metrics, counters = RequestMetrics(), RequestCounters(accepted=9, served=5)
    figures = RecentFigures(metrics, counters)
    nothing = figures.sample(0.0)
    assert (nothing.ttft_p50_ms, nothing.ended, nothing.failed) == (None, 0, 0)
    ttft = metrics.models["a", "m"].ttft
    for seconds in (0.15, 0.15, 0.15, 2.0):
        ttft.observe(seconds)
    for outcome in (Outcome.SERVED, Outcome.SERVED, Outcome.CLIENT_GONE, Outcome.UNREACHABLE):
        counters.count_end(outcome)
    seen = figures.sample(10.0)
    assert seen.ttft_p50_ms == pytest.approx(166.7, abs=0.1), "two thirds through the bucket from 100 to 200 ms"
    assert seen.ttft_p90_ms == pytest.approx(2400.0)
    assert (seen.ended, seen.failed) == (4, 1)
    later = figures.sample(10.0 + WINDOW_S)
    assert (later.ttft_p50_ms, later.ended, later.window_s) == (None, 0, WINDOW_S)


def test_a_time_beyond_all_buckets_is_their_last_bound() -> None:
    metrics = RequestMetrics()
    figures = RecentFigures(metrics, RequestCounters())
    figures.sample(0.0)
    metrics.models["a", "m"].ttft.observe(1e6)
    assert figures.sample(1.0).ttft_p50_ms == 100_000.0


def test_the_log_keeps_the_last_lines_of_each_node_and_no_escape() -> None:
    recent = RecentLog()
    logger = logging.Logger("gpumesh.test")
    logger.addHandler(recent)
    for number in range(MAX_LINES + 5):
        logger.info("line %d", number, extra={"event": "tick", "node": "one" if number % 2 else None})
    logger.warning("\x1b]0;owned\x07" + "x" * 9999, extra={"node": "one"})
    logger.warning("wrong %d", "argument")
    assert recent.lines(None, 1)[0].message == "wrong %d"
    newest, second = recent.lines("one", 2)
    assert (newest.level, len(newest.message)) == ("warning", MAX_MESSAGE_CHARS)
    assert newest.message.startswith("xxx")
    assert (second.event, second.message, second.node) == ("tick", f"line {MAX_LINES + 3}", "one")
    assert len(recent.lines(None, 10**6)) == MAX_LINES
