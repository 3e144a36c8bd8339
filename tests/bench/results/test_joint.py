"""Several runs of the same scenario as one result."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.results.result import BenchResult, result_from_json, result_json
from gpumesh.bench.student_t import interval_between_runs
from tests.bench.example_results import failed_record, full_result, make_stage_run, record, result, summarize_only


def one_run(gap_ms: float, *, failed: int = 0, notes: tuple[str, ...] = ()) -> BenchResult:
    records = []
    for index in range(8):
        sent_s = index * gap_ms * 0.02
        records.append(
            failed_record(index, sent_s=sent_s) if index < failed else record(index, sent_s=sent_s, gap_ms=gap_ms)
        )
    return result(summarize_only(make_stage_run(*records)), notes=notes)


def joined(*runs: BenchResult) -> StageResult:
    (stage,) = join_runs(runs).stages
    return stage


def test_figures_are_means_and_counts_are_sums() -> None:
    runs = [one_run(10.0), one_run(40.0, failed=2)]
    stage = joined(*runs)
    assert (stage.name, stage.concurrency) == ("mesh", 1)
    assert (stage.requests, stage.served, stage.failed) == (16, 14, 2)
    assert stage.latency.tpot.p50 == pytest.approx(20.0), "the geometric mean"
    assert stage.latency.tpot.n == 14
    assert stage.duration_s == pytest.approx(sum(run.stages[0].duration_s for run in runs))
    (failure,) = stage.failures
    assert failure.count == 2
    (share,) = stage.nodes
    assert (share.node, share.served) == ("iceland", 14)


def test_a_sum_of_which_one_run_does_not_know_its_part_is_unknown() -> None:
    known, unknown = one_run(10.0), one_run(10.0)
    (stage,) = unknown.stages
    unknown = replace(unknown, stages=(replace(stage, prompt_tokens=None),))
    both = joined(known, unknown)
    assert (both.prompt_tokens, both.output_tokens) == (None, 2 * 8 * 11)
    assert both.coverage is not None
    assert both.coverage.answers == 16


def test_intervals_are_those_between_the_runs() -> None:
    runs = [one_run(gap) for gap in (10.0, 10.5, 9.5)]
    stage = joined(*runs)
    tpot = interval_between_runs([10.0, 10.5, 9.5])
    assert tpot is not None
    assert (stage.latency.tpot.p50_low, stage.latency.tpot.p50_high) == pytest.approx((tpot.low, tpot.high))
    rates = [run.stages[0].rates.requests_per_s or 0.0 for run in runs]
    assert stage.intervals.requests_per_s == interval_between_runs(rates)
    loaded = stage.intervals.loaded_tokens_per_s
    assert loaded is not None
    assert loaded.batches == 3


def test_a_result_of_several_runs_is_written_and_read() -> None:
    """With every optional part."""
    joint = join_runs([full_result(), full_result()])
    assert result_from_json(json.loads(json.dumps(result_json(joint)))) == joint
    assert len(joint.runs) == 2
    assert joint.scaling == full_result().scaling
    assert joint.routes == full_result().routes
    assert [stage.name for stage in joint.stages] == [stage.name for stage in full_result().stages]


def test_equal_runs_give_their_own_figures() -> None:
    single = full_result()
    for stage, joint in zip(single.stages, join_runs([single, single]).stages, strict=True):
        assert joint.latency.ttft.p50 == stage.latency.ttft.p50
        assert joint.rates.output_tokens_per_s == pytest.approx(stage.rates.output_tokens_per_s)
        assert [phase.name for phase in joint.phases] == [phase.name for phase in stage.phases]
        assert joint.tokens_per_joule == stage.tokens_per_joule


def test_notes_say_in_how_many_runs_they_hold() -> None:
    joint = join_runs([one_run(10.0, notes=("always", "once")), one_run(10.0, notes=("always",))])
    assert joint.notes == ("always", "once (in 1 of 2 runs)")


def test_a_stage_that_a_run_lacks_is_that_of_the_others() -> None:
    whole, cut_short = one_run(10.0), replace(one_run(20.0), stages=())
    assert join_runs([whole, cut_short]).stages == whole.stages


def test_one_run_is_itself() -> None:
    run = one_run(10.0)
    assert join_runs([run]) is run
    with pytest.raises(ValueError, match="no run"):
        join_runs([])
