"""Grubbs' test, against his table."""

from __future__ import annotations

import math
import random

import pytest

from gpumesh.bench.comparison.outliers import find_outlier


def with_distance(n: int, statistic: float) -> list[float]:
    """Values of which the last one has this distance from the mean, in standard deviations; the others are in pairs."""

    def make(far: float) -> list[float]:
        return [math.exp(0.1 * (-1) ** index) for index in range(n - 1)] + [math.exp(far)]

    low, high = 0.1, 100.0
    for _ in range(100):
        far = (low + high) / 2
        logs = [math.log(value) for value in make(far)]
        mean = sum(logs) / n
        deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / (n - 1))
        low, high = (far, high) if (logs[-1] - mean) / deviation < statistic else (low, far)
    return make(low)


@pytest.mark.parametrize(("n", "limit"), [(5, 1.764), (7, 2.139), (9, 2.387)])
def test_the_limits_are_those_of_the_table(n: int, limit: float) -> None:
    """The two-sided limits at 1 % (Grubbs and Beck, 1972; ISO 5725-2, table 5)."""
    assert find_outlier(with_distance(n, limit - 0.005)) is None
    assert find_outlier(with_distance(n, limit + 0.005)) == n - 1


def test_few_runs_and_equal_runs_have_no_outlier() -> None:
    assert find_outlier([1.0, 1.0, 1.0, 9.0]) is None
    assert find_outlier([1.0] * 6) is None
    assert find_outlier([1.0] * 5 + [1.005]) is None, "half a percent does not matter"
    assert find_outlier([0.0, 1.0, 1.0, 1.0, 1.0, 9.0]) is None
    assert find_outlier([1.0, 1.01, 0.99, 0.5, 1.0]) == 3


def test_one_in_a_hundred_series_without_an_outlier_has_one_all_the_same() -> None:
    rng = random.Random(1)
    found = sum(find_outlier([rng.lognormvariate(0.0, 0.1) for _ in range(6)]) is not None for _ in range(1000))
    assert 2 <= found <= 25
