"""Student's t distribution, and the intervals that are made with it. Pure; the standard library has no t distribution.

Sources: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.1 (t by the incomplete beta function) and
26.5.8 (its continued fraction), which Lentz's method evaluates (Press et al., "Numerical Recipes", 5.2 and 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpumesh.bench.stats import Interval

_MAX_TERMS = 500  # of the continued fraction; it needs about the square root of the degrees of freedom
_TINY = 1e-300  # stands for a denominator of 0 in Lentz's method


@dataclass(frozen=True, slots=True)
class Spread:
    """The mean of a sample, the standard error of that mean, and the degrees of freedom of this error."""

    mean: float
    error: float
    df: float


def tail_probability(t: float, df: float) -> float:
    """The probability that a value of Student's distribution is at least ``t`` (``t`` ≥ 0) away from 0, on any side.

    ``df``: the degrees of freedom, above 0; infinite for the normal distribution.
    """
    if math.isinf(t):
        return 0.0
    if df > 1e6:  # no difference from the normal distribution in the first six digits
        return math.erfc(t / math.sqrt(2.0))
    return _incomplete_beta(df / (df + t * t), df / 2.0, 0.5)


@lru_cache(maxsize=4096)
def critical_value(probability: float, df: float) -> float:
    """The t that a value exceeds on either side with this ``probability`` in all: 0.05 for a 95 % interval."""
    low, high = 0.0, 1.0
    while tail_probability(high, df) > probability and high < 1e12:
        low, high = high, high * 2.0
    for _ in range(100):  # bisection: each step halves the error
        middle = (low + high) / 2.0
        if tail_probability(middle, df) > probability:
            low = middle
        else:
            high = middle
    return high


def spread_of(values: Sequence[float]) -> Spread:
    """The mean of independent values with its standard error. Raises ``ValueError`` for fewer than two values."""
    n = len(values)
    if n < 2:
        raise ValueError("one value has no spread")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Spread(mean, math.sqrt(variance / n), n - 1)


def mean_of_runs(values: Sequence[float]) -> float | None:
    """The figure of several runs: the geometric mean; the arithmetic one if a value is not above 0. ``None``: no value.

    The geometric mean, because figures are compared as ratios: then the ratio of two means is the mean ratio.
    """
    if not values:
        return None
    if min(values) == max(values):
        return values[0]  # exactly, without the error of logarithms
    if min(values) > 0:
        return math.exp(math.fsum(map(math.log, values)) / len(values))
    return math.fsum(values) / len(values)


def interval_between_runs(values: Sequence[float]) -> Interval | None:
    """The 95 % confidence interval of a figure from its values in several runs, by Student's t. ``None``: one run."""
    if len(values) < 2:
        return None
    is_log = min(values) > 0
    spread = spread_of([math.log(value) for value in values] if is_log else values)
    width = spread.error * critical_value(0.05, spread.df)
    low, high = spread.mean - width, spread.mean + width
    if is_log:
        low, high = math.exp(low), math.exp(high) if high < 700 else math.inf
    return Interval(max(low, 0.0), high, len(values))


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), for 0 ≤ x ≤ 1."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    if x < (a + 1.0) / (a + b + 2.0):  # where the continued fraction converges fast
        return front * _beta_fraction(x, a, b) / a
    return 1.0 - front * _beta_fraction(1.0 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""

    def not_zero(value: float) -> float:
        return value if abs(value) > _TINY else _TINY

    c = 1.0
    d = 1.0 / not_zero(1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        step = 1.0
        for numerator in (even, odd):
            d = 1.0 / not_zero(1.0 + numerator * d)
            c = not_zero(1.0 + numerator / c)
            step = c * d
            fraction *= step
        if abs(step - 1.0) < 1e-15:
            break
    return fraction
