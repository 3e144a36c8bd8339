"""Intervals of rates: by hand, and how often they hold the true rate."""

from __future__ import annotations

import math
import random

import pytest

from gpumesh.bench.figures.rate_intervals import RateIntervals
from gpumesh.bench.figures.summary import summarize_stage
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import Objective
from gpumesh.bench.student_t import critical_value
from tests.bench.example_results import failed_record, make_stage_run, record, stage, summarize_only


def sequential(*durations_s: float, tokens: int = 10) -> list[LoadSample]:
    """Answers one after the other, each of this time."""
    records, start_s = [], 0.0
    for index, duration_s in enumerate(durations_s):
        gap_ms = duration_s * 1000.0 / tokens
        records.append(record(index, sent_s=start_s, ttft_ms=gap_ms, gap_ms=gap_ms, tokens=tokens))
        start_s += duration_s
    return records


def test_an_interval_by_hand() -> None:
    """One slot: each answer is a batch, but the first one and the last one, which are not in the loaded part."""
    made = summarize_only(make_stage_run(*sequential(3.0, 1.0, 2.0, 1.0, 2.0, 9.0)))
    interval = made.intervals.requests_per_s
    assert interval is not None
    # The rate of the four batches is 4 ÷ 6; the residuals are 1/3 and -1/3, in turn.
    error = math.sqrt(4 / 9 * 4 / 3) / 4
    rate = made.rates.requests_per_s or 0.0
    assert rate == pytest.approx(6 / 18)
    width = rate * error * critical_value(0.05, 3)
    assert [interval.low, interval.high] == pytest.approx([rate - width, rate + width])
    assert interval.batches == 4


def test_what_is_equal_in_all_batches_has_no_width() -> None:
    made = summarize_only(make_stage_run(*sequential(*[0.5] * 8)))
    for interval in (made.intervals.output_tokens_per_s, made.intervals.total_tokens_per_s):
        assert interval is not None
        assert interval.high - interval.low == pytest.approx(0.0, abs=1e-9)


def test_too_few_batches_have_no_interval() -> None:
    assert summarize_only(make_stage_run(*sequential(1.0, 2.0, 1.0))).intervals == RateIntervals()
    at_once = [record(index) for index in range(8)]
    assert summarize_only(make_stage_run(*at_once, of=stage(concurrency=8))).intervals == RateIntervals()
    assert summarize_only(make_stage_run()).intervals == RateIntervals()


def test_requests_that_failed_count_for_no_rate() -> None:
    failed = [failed_record(index, sent_s=index * 0.5) for index in range(6)]
    assert summarize_only(make_stage_run(*failed)).intervals == RateIntervals()


def test_goodput_has_an_interval_of_its_own() -> None:
    made = summarize_only(make_stage_run(*sequential(*[1.0, 1.2] * 6)), Objective(ttft_ms=110.0))
    good, served = made.intervals.goodput_per_s, made.intervals.requests_per_s
    assert good is not None
    assert served is not None
    assert good.high - good.low > 2 * (served.high - served.low), "every second answer is good"


def test_each_route_has_intervals_from_its_own_requests() -> None:
    records = [
        record(index, sent_s=index * 1.0, ttft_ms=100.0 + index * (route == "mesh"), route=route)
        for index, route in enumerate(["tunnel", "mesh"] * 6)
    ]
    tunnel, mesh = summarize_stage(make_stage_run(*records), Objective())
    assert tunnel.intervals.requests_per_s is not None
    assert mesh.intervals.requests_per_s is not None
    assert tunnel.intervals.requests_per_s.batches == 6
    assert mesh.intervals.requests_per_s.high - mesh.intervals.requests_per_s.low > 0.01


def closed_loop(rng: random.Random, slots: int, count: int) -> list[LoadSample]:
    """Answers of 0.5 to 1.5 s, so ``slots`` answers a second in the long run."""
    free_s = [0.0] * slots
    records = []
    for index in range(count):
        start_s = min(free_s)
        duration_s = rng.uniform(0.5, 1.5)
        records.append(record(index, sent_s=start_s, ttft_ms=duration_s * 1000.0, tokens=1))
        free_s[free_s.index(start_s)] = start_s + duration_s
    return records


@pytest.mark.parametrize(("slots", "count"), [(1, 10), (1, 60), (4, 24), (4, 80), (8, 200)])
def test_about_95_of_100_intervals_hold_the_true_rate(slots: int, count: int) -> None:
    rng = random.Random(7)
    held = 0
    for _ in range(200):
        records = closed_loop(rng, slots, count)
        last_sent_s = records[-1].sent_s
        ended = sum(one.ended_s <= last_sent_s for one in records)
        # The stage ends here for its rate, too: without the end in which slots are idle.
        run = make_stage_run(*records, of=stage(count=count, concurrency=slots), duration_s=last_sent_s * count / ended)
        interval = summarize_only(run).intervals.requests_per_s
        assert interval is not None
        held += interval.low <= slots <= interval.high
    assert 0.91 <= held / 200 <= 0.99
