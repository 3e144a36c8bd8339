"""What is not known of a stage is a dash and a note, not a wrong number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.backends.base import ChatRequest, Message, ServerCounters
from gpumesh.bench.figures.answers.answer import read_answers
from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.figures.node_shares import ColdStart, find_cold_starts
from gpumesh.bench.figures.notes.coverage_notes import cold_start_notes, coverage_notes
from gpumesh.bench.figures.summary import StageResult, summarize_stage
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind
from tests.bench.example_results import MODEL, failed_record, make_stage_run, record, stage, summarize_only

WORDS = "river stone window garden market engine signal"  # as many as the tokens of ``record``'s prompt


def planned(words: str = WORDS, tokens: int = 11, **changes: Any) -> PlannedRequest:
    return PlannedRequest(ChatRequest(MODEL, (Message("user", words),), {"num_predict": tokens}), **changes)


def stage_of(*records: LoadSample, requests: tuple[PlannedRequest, ...] = (), **changes: Any) -> StageResult:
    of = replace(stage(count=len(records), concurrency=1), requests=requests) if requests else None
    return summarize_only(make_stage_run(*records, of=of, **changes))


def notes(made: StageResult) -> str:
    return "\n".join(coverage_notes(made))


def test_what_is_whole_needs_no_note() -> None:
    made = stage_of(record(0, server_ms=190.0), record(1, sent_s=0.3, server_ms=190.0))
    assert coverage_notes(made) == []
    assert made.coverage is not None
    assert (made.coverage.answers, made.coverage.token_counts, made.coverage.durations) == (2, 2, 2)
    assert made.coverage.tpot_source == "the server's clock"
    assert coverage_notes(replace(made, coverage=None)) == [], "a result of an older version"


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    counted, uncounted = record(0, node="alpha"), record(1, node="beta", tokens=5, sent_s=0.3)
    uncounted = replace(uncounted, tokens=None, prompt_tokens=None)
    made = stage_of(counted, uncounted)
    assert (made.output_tokens, made.prompt_tokens, made.tokens_per_joule) == (None, None, None)
    assert (made.rates.output_tokens_per_s, made.rates.total_tokens_per_s) == (None, None)
    assert made.intervals.output_tokens_per_s is None
    assert made.rates.requests_per_s is not None
    assert [(share.node, share.output_tokens, share.prompt_tokens) for share in made.nodes] == [
        ("alpha", 11, 7),
        ("beta", None, None),
    ]
    assert "count of the tokens of 1 of 2 answers (beta)" in notes(made)
    assert "the prompt's tokens of 1 of 2 answers (beta)" in notes(made)
    only_prompt = stage_of(counted, replace(record(1), prompt_tokens=None))
    assert only_prompt.output_tokens == 22
    assert only_prompt.rates.output_tokens_per_s is not None
    assert only_prompt.rates.total_tokens_per_s is None


def test_goodput_is_unknown_only_where_the_tpot_decides() -> None:
    uncounted = replace(record(0, gap_ms=10.0), tokens=None)
    fast = summarize_only(make_stage_run(uncounted), Objective(tpot_ms=12.0))
    assert fast.rates.good_share == 1.0, "a token takes no longer than a piece"
    unclear = summarize_only(make_stage_run(uncounted), Objective(tpot_ms=8.0))
    assert (unclear.rates.good_share, unclear.rates.goodput_per_s) == (None, None)
    late = summarize_only(make_stage_run(uncounted), Objective(ttft_ms=50.0, tpot_ms=8.0))
    assert late.rates.good_share == 0.0


def test_an_answer_that_was_cut_is_estimated_by_the_others() -> None:
    whole = record(0, tokens=4, gap_ms=40.0)
    whole = replace(whole, tokens=12)  # three tokens in a piece
    cut = replace(record(1, tokens=2, sent_s=0.4), tokens=None, outcome=SampleOutcome.CUT, prompt_tokens=None)
    made = stage_of(whole, cut, failed_record(2))
    assert made.output_tokens == 12 + 6
    assert (made.prompt_tokens, made.rates.total_tokens_per_s) == (None, None)
    assert "1 answer was cut before the server counted: their tokens are estimated" in notes(made)
    of_another = stage_of(whole, replace(cut, node="beta"))
    assert of_another.output_tokens is None, "nothing is known of its pieces"
    assert "output tokens and their rates are unknown" in notes(of_another)
    nobody_knows_whose = stage_of(whole, replace(cut, node=None, outcome=SampleOutcome.UNFINISHED))
    assert nobody_knows_whose.output_tokens == 18
    assert stage_of(whole, failed_record(2)).prompt_tokens == 7, "what never began has no tokens"


def test_a_mixture_of_clocks_is_said() -> None:
    made = stage_of(record(0, server_ms=190.0), record(1, node="beta"))
    assert made.coverage is not None
    assert made.coverage.tpot_source == "1 by the server's clock, 1 by arrivals"
    assert "TPOT is a mixture: 1 by the server's clock, 1 by arrivals" in notes(made)
    assert "did not say how long it generated 1 of 2 answers (beta): its tok/s and its queue are unknown" in notes(made)


def test_lengths_that_are_not_as_asked() -> None:
    short = record(0, tokens=5, done_reason="stop")
    made = stage_of(
        short, record(1), record(2, tokens=30), requests=(planned(), planned(), planned(f"{WORDS} {WORDS} more"))
    )
    assert made.coverage is not None
    assert (made.coverage.short, made.coverage.stopped, made.coverage.long, made.coverage.cut_prompts) == (1, 1, 1, 1)
    assert "shorter than asked for: 1 of 3 answers (1 ended by the model)" in notes(made)
    assert "longer than asked for: 1 of 3 answers" in notes(made)
    assert "fewer tokens than words in prompts of 1 of 3 answers" in notes(made)


def test_pieces_clocks_and_silence_have_their_notes() -> None:
    large = replace(record(0, tokens=3, gap_ms=40.0), tokens=12)
    hidden = replace(record(1, tokens=4), tokens=40, counters=ServerCounters(eval_ms=390.0), ended_s=0.6)
    lying = record(2, server_ms=1.0)
    silent = record(3, tokens=0, arrivals_s=())
    made = stage_of(large, replace(hidden, node="b"), replace(lying, node="c"), replace(silent, node="d"))
    text = notes(made)
    assert "several tokens came in a piece in 1 of 4 answers" in text
    assert "tokens that it did not send in 1 of 4 answers" in text
    assert "durations of 1 of 4 answers contradict" in text
    assert "1 answer was without any text" in text


def test_power_that_is_not_known() -> None:
    run = make_stage_run(record())
    (made,) = summarize_stage(run, Objective(), GpuUse(1, 9, power_unknown=("beta",)))
    assert made.tokens_per_joule is None
    assert "the power of the GPUs is unknown (beta): energy and tokens/J are unknown" in notes(made)


def test_the_servers_own_times_of_each_node() -> None:
    figures: dict[str, Any] = {"prompt_tokens": 300, "load_ms": 20.0, "prompt_ms": 100.0, "eval_ms": 100.0}
    waited = record(0, node="alpha", counters=ServerCounters(total_ms=620.0, **figures), prompt_tokens=300, ended_s=0.7)
    cold = record(
        1, node="alpha", counters=ServerCounters(total_ms=2300.0, **(figures | {"load_ms": 2100.0})), ended_s=2.4
    )
    cached = replace(waited, counters=ServerCounters(cached_tokens=200, **figures), node="beta")
    made = stage_of(
        waited, replace(cold, prompt_tokens=300), cached, requests=(planned("a"), planned("b"), planned("c"))
    )
    alpha, beta = made.nodes
    assert (alpha.wait_ms.min, alpha.wait_ms.max) == (0.0, 400.0)
    assert (alpha.load_ms.max, alpha.cold_starts) == (2100.0, 1)
    assert alpha.prefill_tokens_per_s.mean == pytest.approx(3000.0)
    assert (beta.wait_ms.n, beta.cold_starts) == (0, 0), "it gave no total"
    assert beta.prefill_tokens_per_s.mean == pytest.approx(1000.0), "what was in the cache was not read"
    (start,) = find_cold_starts(read_answers([waited, cold]))
    assert start == ColdStart("mesh", "alpha", 2100.0)
    assert list(cold_start_notes([start])) == [
        "stage mesh: 1 answer of alpha waited for a load of the model, 2.1 s at most"
    ]
    alike = stage_of(waited, requests=(planned("a b"), planned("a c")))
    assert alike.nodes[0].prefill_tokens_per_s.n == 0, "nobody knows how much was in the cache"


def test_a_stage_of_many_prompts_with_nonces() -> None:
    of = Stage("mesh", StageKind.MESH, (planned("[1] a"), planned("[2] a")), concurrency=1)
    counters = ServerCounters(prompt_ms=7.0)
    made = summarize_only(make_stage_run(record(counters=counters), of=of))
    assert made.nodes[0].prefill_tokens_per_s.mean == pytest.approx(1000.0)
