"""The part of a stage in which all slots were busy, computed by hand beside it."""

from __future__ import annotations

from typing import Any

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.loaded_part import (
    LoadedPart,
    count_waited_inside,
    find_loaded_part,
    load_seconds,
    mean_busy,
    most_at_once,
)
from gpumesh.bench.figures.notes.rate_notes import rate_notes
from gpumesh.bench.load.samples import LoadSample
from tests.bench.example_results import failed_record, make_stage_run, record, stage, summarize_only

# An answer takes a second: a tenth until its first token, then ten tokens, the last of them at its end.
ANSWER: dict[str, Any] = {"ttft_ms": 100.0, "gap_ms": 100.0, "tokens": 10}


def rounds(count: int, level: int) -> list[LoadSample]:
    """``count`` rounds of ``level`` answers each, all in step."""
    return [record(n * level + slot, sent_s=float(n), **ANSWER) for n in range(count) for slot in range(level)]


def test_the_first_round_and_the_last_are_left_out() -> None:
    """Three rounds in step give exactly ten tokens a second for each slot, though no slot has a token for 100 ms."""
    made = summarize_only(make_stage_run(*rounds(3, 2), of=stage(count=6, concurrency=2)))
    rates = made.rates
    assert (rates.ramp_s, rates.loaded_s, rates.tail_s) == pytest.approx((1.0, 1.0, 1.0))
    assert rates.loaded_tokens_per_s == pytest.approx(20.0)
    assert rates.loaded_requests_per_s == pytest.approx(2.0)
    assert rates.loaded_goodput_per_s == pytest.approx(2.0)
    assert rates.best_tokens_per_s == rates.loaded_tokens_per_s
    assert list(rate_notes([made])) == []


def test_a_slow_start_and_a_long_end_are_no_part_of_the_rate() -> None:
    """The first answers wait 4 s for a load, and the last one takes 9 s: the rate between them is the same."""
    late = [record(slot, ttft_ms=4100.0, gap_ms=100.0, tokens=10) for slot in range(2)]
    steady = [record(2 + 2 * n + slot, sent_s=5.0 + n, **ANSWER) for n in range(9) for slot in range(2)]
    last = record(20, sent_s=14.0, ttft_ms=100.0, gap_ms=1000.0, tokens=10)
    made = summarize_only(make_stage_run(*late, *steady, last, of=stage(count=21, concurrency=2)))
    assert made.rates.loaded_tokens_per_s == pytest.approx(20.0)
    assert made.rates.output_tokens_per_s == pytest.approx(9.1, abs=0.1)
    assert (made.rates.ramp_s, made.rates.loaded_s) == pytest.approx((5.0, 9.0))


def test_with_few_rounds_the_part_begins_with_the_stage() -> None:
    two_rounds = find_loaded_part(2, rounds(2, 2))
    assert two_rounds == LoadedPart(0.0, 1.0)
    assert find_loaded_part(4, rounds(1, 4)) is None, "all were sent at once"
    assert find_loaded_part(None, rounds(3, 2)) is None, "an open loop"
    assert find_loaded_part(1, [failed_record(n, sent_s=0.0) for n in range(3)]) is None, "no time has passed"
    slow_node = [record(0, ttft_ms=9000.0, tokens=2), *rounds(4, 1)]
    assert find_loaded_part(2, slow_node) == LoadedPart(0.0, 3.0), "its first answer ended after the last was sent"


def test_few_and_uneven_requests_are_told() -> None:
    uneven = summarize_only(make_stage_run(*rounds(3, 3)[:8], of=stage(count=8, concurrency=3)))
    few = summarize_only(make_stage_run(*rounds(1, 3), of=stage("few", count=3, concurrency=4)))
    one = summarize_only(make_stage_run(*rounds(1, 1), of=stage("one", count=1, concurrency=1)))
    assert list(rate_notes([uneven, few, one])) == [
        "stage mesh: 8 requests are no multiple of 3 in flight",
        "stage few: 3 requests are too few for 4 in flight: its rates are those of the whole stage, with its beginning"
        " and its end",
    ]
    assert few.rates.best_tokens_per_s == few.rates.output_tokens_per_s


def test_how_many_answers_came_at_once() -> None:
    assert most_at_once(rounds(3, 2)) == 2
    follows = record(1, sent_s=0.5, ttft_ms=350.0, gap_ms=100.0, tokens=10)
    assert most_at_once([record(0, **ANSWER), follows]) == 1, "a late client saw two at once for 150 ms"
    joins = record(1, sent_s=0.5, **ANSWER)
    assert most_at_once([record(0, **ANSWER), joins]) == 2, "for 400 ms"
    assert most_at_once([*rounds(3, 4), *rounds(3, 3)]) == 7
    together = record(9, gap_ms=0.0)
    assert most_at_once([together]) == 0, "its pieces came together: nothing is seen"
    assert most_at_once([*rounds(3, 2), together]) == 2
    in_one_read = [record(number, gap_ms=0.0) for number in range(3)]
    assert most_at_once(in_one_read) == 0, "no time passed between the pieces"
    assert most_at_once([record(0, tokens=1), failed_record(1)]) == 0, "a single piece shows nothing"


def test_how_many_the_server_worked_on() -> None:
    """By the server's clock: the second request waited half a second inside it. Without a clock: from the first
    piece."""
    counters = ServerCounters(7, 10, total_ms=1500.0, load_ms=0.0, prompt_ms=100.0, eval_ms=900.0)
    waited = record(1, sent_s=0.5, ttft_ms=600.0, gap_ms=100.0, tokens=10, counters=counters)
    assert mean_busy([waited], LoadedPart(0.0, 2.0)) == pytest.approx(0.5)
    assert mean_busy([record(0, **ANSWER)], LoadedPart(0.0, 2.0)) == pytest.approx(0.45)
    assert mean_busy([waited], None) is None
    assert count_waited_inside([waited, record(0, server_ms=120.0)]) == 1
    assert count_waited_inside([record(0)]) is None, "the server does not tell"


def test_only_a_real_load_counts() -> None:
    loads = [record(n, counters=ServerCounters(load_ms=ms)) for n, ms in enumerate((30.0, 2500.0, 500.0))]
    assert load_seconds(loads) == pytest.approx(3.0)
