"""How sure a figure is: by published formulas, and against how much it really changes."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from gpumesh.bench.comparison.estimates import (
    ASSUMED_DRIFT,
    Estimate,
    Measurement,
    estimate_pair,
    median_error,
    rate_error,
)
from gpumesh.bench.stats import Interval, SampleSummary, summarize_sample
from gpumesh.bench.student_t import critical_value, interval_between_runs, mean_of_runs


def test_the_error_of_a_median_by_hand() -> None:
    """Ten values: the interval is from the 2nd to the 9th, and misses the median with a probability of 22 ÷ 1024."""
    sample = summarize_sample([float(value) for value in range(1, 11)])
    error, df = median_error(sample)
    assert error == pytest.approx(math.log(9 / 2) / 2 / critical_value(22 / 1024, math.inf))
    assert df == 9
    assert median_error(summarize_sample([1.0] * 5)) == (None, math.inf), "too few values"
    assert median_error(SampleSummary(0)) == (None, math.inf)


@pytest.mark.parametrize("n", [20, 101])
def test_the_error_of_a_median_is_how_much_medians_change(n: int) -> None:
    rng = random.Random(3)
    medians, errors = [], []
    for _ in range(600):
        sample = summarize_sample(rng.lognormvariate(4.0, 0.2) for _ in range(n))
        error, _ = median_error(sample)
        assert error is not None
        assert sample.p50 is not None
        medians.append(math.log(sample.p50))
        errors.append(error)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(medians), rel=0.12)


def test_the_error_of_a_rate_is_that_of_its_interval() -> None:
    width = 0.02 * critical_value(0.05, 9)
    assert rate_error(50.0, Interval(50.0 * (1 - width), 50.0 * (1 + width), 10)) == pytest.approx((0.02, 9))
    assert rate_error(50.0, None) == (None, math.inf)
    assert rate_error(0.0, Interval(0.0, 0.0, 10)) == (None, math.inf)


def test_a_single_run_has_the_error_within_it_and_the_assumed_drift() -> None:
    one = Measurement((100.0,), error=0.02, df=9)
    estimate, other = estimate_pair(one, Measurement((50.0,), error=0.0), is_log=True) or (None, None)
    assert estimate is not None
    assert other == Estimate(math.log(50.0), ASSUMED_DRIFT, math.inf)
    assert (estimate.center, estimate.error) == pytest.approx((math.log(100.0), math.hypot(0.02, ASSUMED_DRIFT)))
    assert estimate.df == pytest.approx(9 * (estimate.error / 0.02) ** 4)


def test_several_runs_have_the_error_of_their_mean() -> None:
    values = (10.0, 10.2, 9.9)
    estimate, _ = estimate_pair(Measurement(values), Measurement(values), is_log=True) or (None, None)
    logs = [math.log(value) for value in values]
    assert estimate is not None
    assert estimate.df == 2
    assert (estimate.center, estimate.error) == pytest.approx(
        (statistics.mean(logs), statistics.stdev(logs) / math.sqrt(3))
    )


def test_a_single_run_beside_several_has_their_spread() -> None:
    several = Measurement((10.0, 10.2, 9.9, 10.1))
    _, single = estimate_pair(several, Measurement((11.0,), error=0.5), is_log=True) or (None, None)
    assert single is not None
    assert single.error == pytest.approx(statistics.stdev(math.log(value) for value in several.values))
    assert single.df == 3


def test_what_is_unknown_has_no_estimate() -> None:
    known = Measurement((1.0,), error=0.1)
    assert estimate_pair(known, Measurement(()), is_log=True) is None
    assert estimate_pair(Measurement((1.0,)), known, is_log=True) is None


def test_the_figure_of_several_runs_is_their_geometric_mean() -> None:
    assert mean_of_runs([2.0, 8.0]) == pytest.approx(4.0)
    assert mean_of_runs([0.0, 8.0]) == 4.0
    assert mean_of_runs([]) is None


def test_the_interval_between_runs() -> None:
    assert interval_between_runs([5.0]) is None
    interval = interval_between_runs([1.0, math.e])
    assert interval is not None
    width = 0.5 * critical_value(0.05, 1)
    assert [math.log(interval.low), math.log(interval.high)] == pytest.approx([0.5 - width, 0.5 + width])
    zero = interval_between_runs([0.0, 1.0])
    assert zero is not None
    assert zero.low == 0.0
    assert zero.high == pytest.approx(0.5 + width)
    wild = interval_between_runs([1e-30, 1e30])
    assert wild is not None
    assert math.isinf(wild.high)
