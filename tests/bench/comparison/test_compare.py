"""Verdicts on differences that are there, that are not, and that nobody can see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.bench.comparison.compare import Basis, Difference, DifferenceVerdict, compare
from gpumesh.bench.figures.rate_intervals import RateIntervals
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.load.samples import ClientLoad
from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.results.result import BenchResult
from tests.bench.example_results import failed_record, make_stage_run, record, result, stage, summarize_only

SINGLE = (
    "both are single runs: how much a run differs from the next is not known, and taken for 1 % (`bench run --repeat"
)


def measured(name: str = "mesh", *, ttft_ms: float = 100.0, gap_ms: float = 10.0, count: int = 20) -> StageResult:
    """``count`` answers, one after the other; each a little different, so that medians have an interval."""
    records, start_s = [], 0.0
    for n in range(count):
        records.append(record(n, sent_s=start_s, ttft_ms=ttft_ms + n % 5, gap_ms=gap_ms, server_ms=ttft_ms))
        start_s = records[-1].ended_s
    return summarize_only(make_stage_run(*records, of=stage(name)))


def repeated(*gaps_ms: float) -> BenchResult:
    """A result of several runs, whose time per token changes from run to run."""
    return join_runs([result(measured(gap_ms=gap_ms)) for gap_ms in gaps_ms])


def differences(a: BenchResult, b: BenchResult) -> dict[str, Difference]:
    return {one.figure: one for one in compare(a, b).differences}


def verdicts(a: BenchResult, b: BenchResult) -> dict[str, DifferenceVerdict]:
    return {name: one.verdict for name, one in differences(a, b).items()}


def test_better_and_worse_each_in_its_own_direction() -> None:
    slow, quick = result(measured(ttft_ms=100.0, gap_ms=10.0)), result(measured(ttft_ms=50.0, gap_ms=5.0))
    assert set(verdicts(slow, quick).values()) == {DifferenceVerdict.BETTER}
    assert set(verdicts(quick, slow).values()) == {DifferenceVerdict.WORSE}
    assert set(verdicts(slow, slow).values()) == {DifferenceVerdict.SAME}
    assert set(verdicts(slow, slow)) >= {"ttft p50", "tpot p50", "end-to-end p50", "tokens/s", "goodput"}


def test_a_difference_has_both_values_their_ratio_and_its_interval() -> None:
    tpot = differences(result(measured(gap_ms=10.0)), result(measured(gap_ms=20.0)))["tpot p50"]
    assert (tpot.stage, tpot.unit, tpot.verdict) == ("mesh", "ms", DifferenceVerdict.WORSE)
    assert [tpot.a, tpot.b, tpot.ratio] == pytest.approx([10.0, 20.0, 2.0])
    assert tpot.ratio_low is not None
    assert tpot.ratio_high is not None
    # The times per token have no spread of their own: what is left is the drift that is assumed for single runs.
    assert 1.85 < tpot.ratio_low < 1.95 < 2.05 < tpot.ratio_high < 2.15


def test_few_values_tell_nothing() -> None:
    few = verdicts(result(measured(count=3)), result(measured(count=3, ttft_ms=500.0)))
    assert set(few.values()) == {DifferenceVerdict.UNKNOWN}


def test_medians_within_the_noise_are_the_same() -> None:
    """Single runs may differ by some percent."""
    assert verdicts(result(measured()), result(measured(ttft_ms=102.0)))["ttft p50"] is DifferenceVerdict.SAME


def test_what_nobody_would_notice_is_no_difference_however_sure() -> None:
    exact, nearly, slower = (repeated(gap, gap + 0.001, gap - 0.001) for gap in (10.0, 10.05, 10.2))
    tpot = differences(exact, nearly)["tpot p50"]
    assert tpot.ratio_low is not None
    assert tpot.ratio_low > 1.0, "the change is sure"
    assert tpot.verdict is DifferenceVerdict.SAME, "and too small"
    assert verdicts(exact, slower)["tpot p50"] is DifferenceVerdict.WORSE


def test_the_spread_between_runs_counts() -> None:
    """Within each run all times per token are equal."""
    steady, unsteady = repeated(10.0, 10.1, 9.9), repeated(10.0, 12.0, 11.0)
    assert compare(steady, unsteady).basis is Basis.BETWEEN_RUNS
    assert verdicts(steady, unsteady)["tpot p50"] is DifferenceVerdict.SAME
    assert verdicts(steady, repeated(11.0, 11.1, 10.9))["tpot p50"] is DifferenceVerdict.WORSE


def test_a_single_run_beside_several_is_one_more_of_the_same_spread() -> None:
    steady, unsteady = repeated(10.0, 10.02, 9.98, 10.01, 9.99), repeated(10.0, 12.0, 11.0, 9.0, 8.0)
    single = result(measured(gap_ms=11.0))
    assert compare(steady, single).basis is Basis.BETWEEN_RUNS
    assert verdicts(steady, single)["tpot p50"] is DifferenceVerdict.WORSE
    assert verdicts(single, steady)["tpot p50"] is DifferenceVerdict.BETTER
    assert verdicts(unsteady, single)["tpot p50"] is DifferenceVerdict.SAME


def test_a_run_that_is_an_outlier_is_left_out_and_named() -> None:
    steady, paused = repeated(10.0, 10.1, 9.9, 10.05, 9.95), repeated(10.0, 10.1, 9.9, 15.0, 9.95)
    comparison = compare(steady, paused)
    tpot = next(one for one in comparison.differences if one.figure == "tpot p50")
    assert (tpot.left_out_a, tpot.left_out_b) == (None, 4)
    assert tpot.b == pytest.approx(9.987, abs=0.001), "the mean of the others"
    assert tpot.verdict is DifferenceVerdict.SAME
    (caveat,) = comparison.caveats
    assert caveat.startswith("run 4 of B is an outlier and left out of: mesh tpot p50, ")


def test_tails_are_compared_only_between_several_runs() -> None:
    single, several = result(measured()), repeated(10.0, 10.1, 9.9)
    assert "ttft p90" not in verdicts(single, single)
    assert "ttft p90" not in verdicts(several, single)
    assert "ttft p90" in verdicts(several, several)


def test_a_rate_that_becomes_0_is_worse() -> None:
    """It has no ratio that has a logarithm."""
    good, none = measured(), measured(ttft_ms=3000.0)
    assert none.rates.goodput_per_s == 0.0
    made = join_runs([result(good), result(good), result(measured(gap_ms=10.2))])
    goodput = differences(made, join_runs([result(none)] * 3))["goodput"]
    assert (goodput.verdict, goodput.ratio) == (DifferenceVerdict.WORSE, 0.0)
    assert differences(join_runs([result(none)] * 3), made)["goodput"].verdict is DifferenceVerdict.BETTER


def test_a_result_without_intervals_is_read_and_has_no_verdict_on_rates() -> None:
    """Results that were written before rates had intervals."""
    old = result(replace(measured(), intervals=RateIntervals()))
    found = verdicts(old, result(measured(gap_ms=20.0)))
    assert found["tokens/s"] is DifferenceVerdict.UNKNOWN
    assert found["tpot p50"] is DifferenceVerdict.WORSE


def test_failures_are_compared_by_their_share() -> None:
    def failing(failed: int, count: int = 40) -> BenchResult:
        records = [record(n) if n >= failed else failed_record(n) for n in range(count)]
        return result(summarize_only(make_stage_run(*records)))

    assert "failed share" not in verdicts(failing(0), failing(0))
    share = differences(failing(0), failing(20))["failed share"]
    assert (share.a, share.b, share.ratio, share.verdict) == (0.0, 0.5, None, DifferenceVerdict.WORSE)
    assert verdicts(failing(20), failing(0))["failed share"] is DifferenceVerdict.BETTER
    assert verdicts(failing(20), failing(20))["failed share"] is DifferenceVerdict.SAME
    assert verdicts(failing(0), failing(1))["failed share"] is DifferenceVerdict.SAME, "one failure may be chance"


def test_stages_without_a_counterpart() -> None:
    found = compare(result(measured("c=1"), measured("c=2")), result(measured("c=2"), measured("c=4")))
    assert (found.only_a, found.only_b) == (("c=1",), ("c=4",))
    assert {one.stage for one in found.differences} == {"c=2"}
    assert compare(result(), result()).differences == ()


def test_routes_are_stages_of_their_own() -> None:
    made = replace(measured("iceland"), route="tunnel")
    assert stage_label(made) == "iceland via tunnel"
    assert {one.stage for one in compare(result(made), result(made)).differences} == {"iceland via tunnel"}


def test_what_else_is_different_is_said() -> None:
    plain = result(measured())
    (single,) = compare(plain, plain).caveats
    assert single.startswith(SINGLE)
    several = repeated(10.0, 10.1)
    assert compare(several, several).caveats == ()

    def on(**changes: object) -> BenchResult:
        return replace(several, environment=replace(several.environment, **changes))  # type: ignore[arg-type]

    assert "different machines" in compare(several, on(cpus=64)).caveats[0]
    assert compare(several, on(gpumesh="0.2.0")).caveats == ("measured by gpumesh 0.1.0 and 0.2.0",)
    assert compare(several, on(embedded=False)).caveats == (
        "the mesh was in the measuring process in A and already running in B",
    )
    fewer = join_runs([result(measured(count=10))] * 2)
    assert compare(several, fewer).caveats == ("not the same number of requests in a run: 20 and 10",)


def test_a_client_that_limited_is_said() -> None:
    bound = replace(measured(), client=ClientLoad(cpu=1.0, lag_p99_ms=50.0, bound="this process used 100% of a core"))
    assert compare(result(measured()), result(bound)).caveats[1:] == (
        "B was bound by the client in some stage (see its notes)",
    )
