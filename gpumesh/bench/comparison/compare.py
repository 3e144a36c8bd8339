"""Compares two benchmark results: which figures became better or worse, and which differences are only noise. Pure.

The verdicts of all figures are made together (``significance``). A change of less than ``MIN_CHANGE`` is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.bench.comparison.caveats import find_caveats
from gpumesh.bench.comparison.compared_figures import ComparedFigure, figures_to_compare
from gpumesh.bench.comparison.estimates import Measurement, estimate_pair
from gpumesh.bench.comparison.significance import (
    Change,
    change_between,
    fisher_p_value,
    interval_errors,
    verdict_threshold,
)
from gpumesh.bench.comparison.unlike import find_unlike
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import ratio

# A smaller change is no difference, however sure it is: nobody would notice it, and the spread between runs that follow
# each other does not tell what changes from one hour to the next.
MIN_CHANGE = 0.01
FAILED_SHARE = "failed share"


class DifferenceVerdict(StrEnum):
    """How a figure of result B differs from that of result A."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    """These results show no difference."""
    UNKNOWN = "unknown"
    """There are too few requests or runs to tell."""


class Basis(StrEnum):
    """Which spread a verdict comes from."""

    BETWEEN_RUNS = "between-runs"
    WITHIN_RUNS = "within-runs"
    """Both results have a single run. Their spread from run to run is assumed (``estimates.ASSUMED_DRIFT``)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of one stage in both results, A and B. ``ratio`` is B ÷ A; ``verdict`` tells how B differs from A.

    The true ratio lies between ``ratio_low`` and ``ratio_high``. This interval is wide enough for the number of figures
    that are compared. It is ``None`` if it is unknown, and for the share of failures. ``left_out_a`` and ``left_out_b``
    are the numbers of the runs that are left out as outliers (``outliers``).
    """

    stage: str
    figure: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    verdict: DifferenceVerdict
    ratio_low: float | None = None
    ratio_high: float | None = None
    more_is_better: bool = False
    left_out_a: int | None = None
    left_out_b: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two results, A and B.

    ``caveats`` are sentences about differences between the runs that may explain the differences between the figures.
    ``unlike`` are those that forbid the comparison: different things were measured. ``only_a`` and ``only_b`` are the
    labels of the stages that the other result does not have. ``runs_a`` and ``runs_b``: how many runs each has.
    """

    differences: tuple[Difference, ...]
    caveats: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    basis: Basis = Basis.WITHIN_RUNS
    runs_a: int = 1
    runs_b: int = 1


@dataclass(frozen=True, slots=True)
class _Tested:
    """A difference before the verdict. ``change`` and ``p_value`` are ``None`` if it cannot be tested.

    ``a_center`` is what turns a change of plain values into a ratio; ``None`` for a change of logarithms.
    """

    difference: Difference
    p_value: float | None = None
    change: Change | None = None
    a_center: float | None = None


def compare(a: BenchResult, b: BenchResult) -> Comparison:
    """Compares result B with result A: the figures of all stages that both results have, by the stage's label."""
    stages_a, stages_b = _runs_by_stage(a), _runs_by_stage(b)
    tested: list[_Tested] = []
    for label, runs_a in stages_a.items():
        if label in stages_b:
            tested.extend(_test_stage(label, runs_a, stages_b[label]))
    differences = tuple(_decide(tested))
    return Comparison(
        differences=differences,
        caveats=(*find_caveats(a, b), *_left_out_caveats(differences)),
        only_a=tuple(label for label in stages_a if label not in stages_b),
        only_b=tuple(label for label in stages_b if label not in stages_a),
        unlike=tuple(find_unlike(a, b)),
        basis=Basis.BETWEEN_RUNS if len(a.runs) > 1 or len(b.runs) > 1 else Basis.WITHIN_RUNS,
        runs_a=max(len(a.runs), 1),
        runs_b=max(len(b.runs), 1),
    )


def _left_out_caveats(differences: Sequence[Difference]) -> Iterator[str]:
    """A sentence for each run that is left out of some figures, with these figures."""
    figures: dict[tuple[str, int], list[str]] = {}
    for difference in differences:
        for label, run in (("A", difference.left_out_a), ("B", difference.left_out_b)):
            if run is not None:
                figures.setdefault((label, run), []).append(f"{difference.stage} {difference.figure}")
    for (label, run), names in sorted(figures.items()):
        yield f"run {run} of {label} is an outlier and left out of: {', '.join(names)}"


def _runs_by_stage(result: BenchResult) -> dict[str, list[StageResult]]:
    """The stage in each run of the result, by the stage's label. Of a stage that a run has twice, the last counts.

    Runs that had another number of requests in flight than the first one are left out.
    """
    stages: dict[str, list[StageResult]] = {}
    for run in result.runs or (result,):
        for label, stage in {stage_label(stage): stage for stage in run.stages}.items():
            same = stages.setdefault(label, [])
            if not same or same[0].concurrency == stage.concurrency:
                same.append(stage)
    return stages


def _test_stage(label: str, runs_a: list[StageResult], runs_b: list[StageResult]) -> Iterator[_Tested]:
    """Tests the figures of one stage in both results. A figure that a result lacks in both is left out."""
    for figure in figures_to_compare(runs_a, runs_b):
        a, b = figure.measure(runs_a), figure.measure(runs_b)
        if a.values or b.values:
            yield _test_figure(label, figure, a, b)
    failures = _test_failures(label, runs_a, runs_b)
    if failures is not None:
        yield failures


def _test_figure(label: str, figure: ComparedFigure, a: Measurement, b: Measurement) -> _Tested:
    """Tests one figure: by the ratio, or by the difference if a value is 0."""
    difference = Difference(
        label,
        figure.name,
        figure.unit,
        a.value,
        b.value,
        ratio(b.value, a.value),
        DifferenceVerdict.UNKNOWN,
        more_is_better=figure.more_is_better,
        left_out_a=a.left_out,
        left_out_b=b.left_out,
    )
    is_log = min((*a.values, *b.values)) > 0
    estimates = estimate_pair(a, b, is_log=is_log)
    if estimates is None:
        return _Tested(difference)
    estimate_a, estimate_b = estimates
    change = change_between(estimate_a, estimate_b)
    return _Tested(difference, change.p_value, change, None if is_log else estimate_a.center)


def _test_failures(label: str, runs_a: list[StageResult], runs_b: list[StageResult]) -> _Tested | None:
    """Tests the share of requests that failed or whose answer was cut, from 0 to 1; ``None`` if no request failed."""
    failed_a, failed_b = _count_failed(runs_a), _count_failed(runs_b)
    if failed_a + failed_b == 0:
        return None
    count_a, count_b = (max(sum(stage.requests for stage in runs), 1) for runs in (runs_a, runs_b))
    share_a, share_b = failed_a / count_a, failed_b / count_b
    difference = Difference(
        label, FAILED_SHARE, "", share_a, share_b, ratio(share_b, share_a), DifferenceVerdict.UNKNOWN
    )
    return _Tested(difference, fisher_p_value(failed_a, count_a, failed_b, count_b))


def _count_failed(runs: list[StageResult]) -> int:
    return sum(stage.failed + stage.cut for stage in runs)


def _decide(tested: list[_Tested]) -> Iterator[Difference]:
    """The differences with their verdicts, and with intervals that match the verdicts."""
    p_values = [test.p_value for test in tested if test.p_value is not None]
    threshold = verdict_threshold(p_values)
    changed_error, same_error = interval_errors(p_values)
    for test in tested:
        if test.p_value is None:
            yield test.difference
            continue
        is_significant = test.p_value <= threshold and test.p_value < 1.0
        low, high = _ratio_interval(test, changed_error if is_significant else same_error)
        verdict = _verdict(test.difference) if is_significant else DifferenceVerdict.SAME
        yield replace(test.difference, verdict=verdict, ratio_low=low, ratio_high=high)


def _verdict(difference: Difference) -> DifferenceVerdict:
    """The verdict on a figure whose change is significant, so that both values are known."""
    if difference.ratio is not None and abs(difference.ratio - 1.0) < MIN_CHANGE:
        return DifferenceVerdict.SAME
    is_more = (difference.b or 0.0) > (difference.a or 0.0)
    return DifferenceVerdict.BETTER if is_more == difference.more_is_better else DifferenceVerdict.WORSE


def _ratio_interval(tested: _Tested, error_probability: float) -> tuple[float | None, float | None]:
    """The interval of the ratio B ÷ A, low and high; both are ``None`` if the figure has no interval."""
    if tested.change is None or tested.a_center == 0:
        return None, None
    low, high = tested.change.interval(error_probability)
    if tested.a_center is not None:
        return max(1.0 + low / tested.a_center, 0.0), 1.0 + high / tested.a_center
    return math.exp(low), math.exp(min(high, 700.0))  # a larger power would overflow
