"""Against numpy, against the binomial distribution itself, and against values computed by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.bench.stats import (
    SampleSummary,
    gaps_ms,
    median_interval,
    percentile,
    rate,
    ratio,
    summarize_sample,
    supports_percentile,
    tpot_ms,
)

SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(SAMPLES, st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_is_numpys_of_the_same_kind(values: list[float], share: float) -> None:
    """Nearest rank, type 1 of Hyndman and Fan."""
    expected = np.quantile(np.array(values), share, method="inverted_cdf")
    assert percentile(sorted(values), share) == expected


def test_percentiles_by_hand() -> None:
    ordered = [float(value) for value in range(1, 11)]
    assert [percentile(ordered, share) for share in (0.1, 0.5, 0.9, 0.99, 1.0)] == [1.0, 5.0, 9.0, 10.0, 10.0]
    assert percentile([7.0], 0.01) == 7.0
    with pytest.raises(ValueError, match="empty"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("n", "share", "may"),
    [
        (1, 0.5, False),
        (2, 0.5, True),
        (9, 0.9, False),
        (10, 0.9, True),
        (99, 0.99, False),
        (100, 0.99, True),
        (100, 0.9, True),
        (1000, 0.999, True),
    ],
)
def test_a_percentile_needs_a_value_beyond_it(n: int, share: float, may: bool) -> None:
    assert supports_percentile(n, share) is may


def lower_tail(n: int, rank: int) -> float:
    """P(X <= rank) of a fair coin, exactly."""
    return float(Fraction(sum(math.comb(n, k) for k in range(rank + 1)), 2**n))


@pytest.mark.parametrize("n", [*range(6, 60), 100, 1000])
def test_the_medians_interval_is_the_narrowest_that_holds_95_percent(n: int) -> None:
    ordered = [float(value) for value in range(n)]
    interval = median_interval(ordered)
    assert interval is not None
    low, high = int(interval[0]), int(interval[1])
    assert low == n - 1 - high, "symmetric"
    assert lower_tail(n, low) <= 0.025 < lower_tail(n, low + 1)


def test_few_values_have_no_interval_of_the_median() -> None:
    assert [median_interval([1.0] * n) for n in range(6)] == [None] * 6
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)
    assert median_interval([float(value) for value in range(1, 11)]) == (2.0, 9.0), "Conover's table for n = 10"


@pytest.mark.parametrize("n", [5000, 1_000_000])
def test_a_large_sample_does_not_underflow(n: int) -> None:
    """0.5 ** 5000 is 0 in floating point."""
    interval = median_interval(range(n))
    assert interval is not None
    half = 1.96 * math.sqrt(n) / 2
    assert interval[0] == pytest.approx(n / 2 - half, abs=3)
    assert interval[1] == pytest.approx(n / 2 + half, abs=3)


def test_a_spread_by_hand() -> None:
    values = [4.0, None, 1.0, math.nan, 3.0, math.inf, 2.0]
    assert summarize_sample(values) == SampleSummary(n=4, mean=2.5, min=1.0, max=4.0, p50=2.0)
    assert summarize_sample([]) == SampleSummary(0)
    assert summarize_sample([None]) == SampleSummary(0)
    assert summarize_sample([5.0]) == SampleSummary(n=1, mean=5.0, min=5.0, max=5.0), (
        "one value has no median of a distribution"
    )


@given(SAMPLES)
def test_a_spread_says_only_what_its_sample_allows(values: list[float]) -> None:
    made = summarize_sample(values)
    ordered = sorted(values)
    assert made.n == len(values)
    assert (made.min, made.max) == (ordered[0], ordered[-1])
    assert made.mean == pytest.approx(float(np.mean(values)), abs=1e-6)
    assert (made.p50 is not None, made.p90 is not None, made.p99 is not None) == (
        len(values) >= 2,
        len(values) >= 10,
        len(values) >= 100,
    )
    known = [value for value in (made.min, made.p50, made.p90, made.p99, made.max) if value is not None]
    assert known == sorted(known)
    if made.p50_low is not None and made.p50_high is not None and made.p50 is not None:
        assert made.p50_low <= made.p50 <= made.p50_high


def test_time_per_output_token() -> None:
    assert tpot_ms(200.0, 1200.0, 101) == 10.0
    assert tpot_ms(200.0, 1200.0, 2) == 1000.0
    assert [tpot_ms(200.0, 200.0, few) for few in (0, 1)] == [None, None], "one token has no time between tokens"
    assert [tpot_ms(None, 1.0, 5), tpot_ms(1.0, None, 5), tpot_ms(1.0, 2.0, None)] == [None, None, None]


def test_gaps_are_between_neighbours() -> None:
    assert gaps_ms([1.0, 1.5, 1.75]) == (500.0, 250.0)
    assert (gaps_ms([1.0]), gaps_ms([])) == ((), ())


def test_rates_and_ratios_of_nothing_are_unknown() -> None:
    assert (rate(10, 4.0), rate(0, 4.0), rate(10, 0.0)) == (2.5, 0.0, None)
    assert (ratio(1.0, 4.0), ratio(1.0, 0.0), ratio(1.0, None), ratio(None, 4.0)) == (0.25, None, None, None)
