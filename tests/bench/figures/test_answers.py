"""What is known of an answer: each figure is right, or there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.answers.answer import Answer, Hidden, TpotSource, read_answer, read_answers
from gpumesh.bench.load.samples import LoadSample
from tests.bench.example_results import record

# 64 tokens, one each 10 ms: the first after 200 ms.
TOKENS, GAP_MS, FIRST_MS = 64, 10.0, 200.0
SPAN_MS = (TOKENS - 1) * GAP_MS


def answer_of(
    *,
    per_piece: int = 1,
    hidden: int = 0,
    counted: int | None = TOKENS,
    counters: Any = None,
    first_ms: float = FIRST_MS,
) -> LoadSample:
    """An answer of 64 tokens, of which the first ``hidden`` are not sent. A piece is sent with its last token."""
    ends = [*range(hidden + per_piece, TOKENS, per_piece), TOKENS]  # how many tokens are there with each piece
    arrivals = tuple((FIRST_MS + (end - 1) * GAP_MS) / 1000.0 for end in ends)
    ended_s = arrivals[-1] + 0.001
    return replace(record(), tokens=counted, arrivals_s=arrivals, ended_s=ended_s, counters=counters)


def durations(factor: float = 1.0, **changes: Any) -> ServerCounters:
    """True durations of ``answer_of``, times ``factor``."""
    usual = {"total_ms": FIRST_MS + SPAN_MS, "load_ms": 0.0, "prompt_ms": FIRST_MS - 1, "eval_ms": SPAN_MS}
    return ServerCounters(**{name: value * factor for name, value in usual.items()} | changes)


def read(**changes: Any) -> Answer:
    return read_answer(answer_of(**changes))


@pytest.mark.parametrize("per_piece", [1, 2, 5, 20])
@pytest.mark.parametrize("counters", [None, durations()])
def test_pieces_of_several_tokens(per_piece: int, counters: ServerCounters | None) -> None:
    answer = read(per_piece=per_piece, counters=counters)
    assert answer.tpot_ms == pytest.approx(GAP_MS, rel=0.02)
    assert answer.tpot_source is (TpotSource.SERVER if counters else TpotSource.ARRIVALS)
    assert answer.hidden is (Hidden.NOTHING if per_piece == 1 else Hidden.LARGE_PIECES)
    assert not answer.contradicted


def test_thinking_that_is_counted_and_not_sent() -> None:
    by_server = read(hidden=40, counters=durations())
    assert (by_server.hidden, by_server.tpot_source) == (Hidden.TOKENS, TpotSource.SERVER)
    assert by_server.tpot_ms == pytest.approx(GAP_MS)
    without = read(hidden=40)
    assert without.hidden is Hidden.UNKNOWN, "they could as well be in the pieces"
    assert (without.tpot_ms, without.arrival_tpot_ms) == (None, None)
    assert without.lacks_tpot


def test_without_a_count_there_is_no_tpot() -> None:
    answer = read(counted=None, counters=durations())
    assert (answer.tokens, answer.tpot_ms, answer.tpot_source, answer.counters.tokens_per_s) == (None,) * 4
    assert answer.lacks_tpot
    one_token = read_answer(record(tokens=1))
    assert one_token.tpot_ms is None
    assert not one_token.lacks_tpot, "it has none"


@pytest.mark.parametrize("counted", [5, 10_000_000])
def test_a_count_that_cannot_be(counted: int) -> None:
    answer = read(counted=counted)
    assert (answer.tokens, answer.tpot_ms) == (None, None)


@pytest.mark.parametrize(
    "counters",
    [
        durations(1e-6),  # 64 million tokens/s
        durations(0.5),
        durations(2.0),
        durations(eval_ms=0.001),
        durations(eval_ms=SPAN_MS * 1.25, total_ms=None, prompt_ms=None),
        durations(total_ms=10.0),
        durations(load_ms=30_000.0),
    ],
)
def test_clocks_that_lie(counters: ServerCounters) -> None:
    answer = read(counters=counters)
    assert answer.contradicted
    assert (answer.counters.eval_ms, answer.counters.waited_ms, answer.counters.tokens_per_s) == (None, None, None)
    assert answer.tpot_ms == pytest.approx(GAP_MS)
    assert answer.tpot_source is TpotSource.ARRIVALS
    assert answer.counters.tokens == TOKENS, "only the clock is wrong"


def test_one_answer_that_is_held_up_is_no_wrong_clock() -> None:
    usual = answer_of(counters=durations())
    late = record(
        3, tokens=TOKENS, arrivals_s=(*usual.arrivals_s[:-1], 3.0), ended_s=3.0, counters=durations(), sent_s=0.0
    )
    answers = read_answers([usual, usual, late])
    assert [answer.contradicted for answer in answers] == [False] * 3
    assert [answer.held_up for answer in answers] == [False, False, True]
    assert answers[2].tpot_ms == pytest.approx(GAP_MS), "of the server"
    assert [answer.contradicted for answer in read_answers([usual, late, late])] == [True] * 3


def test_an_answer_that_came_at_once_keeps_the_servers_figures() -> None:
    """A proxy on the way held it back."""
    whole_ms = FIRST_MS + SPAN_MS
    at_once = record(
        tokens=TOKENS, arrivals_s=(whole_ms / 1000.0,) * TOKENS, ended_s=whole_ms / 1000.0, counters=durations()
    )
    assert read_answer(at_once).tpot_ms == pytest.approx(GAP_MS)
    bare = record(tokens=TOKENS, arrivals_s=(whole_ms / 1000.0,) * TOKENS, ended_s=whole_ms / 1000.0)
    assert read_answer(bare).tpot_ms is None, "no hardware is so fast"
