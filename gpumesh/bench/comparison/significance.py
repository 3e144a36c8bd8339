"""Decides which of many figures have changed, so that few verdicts are false however many figures there are. Pure.

- Each figure: Welch's t test of the difference of two means with unequal variances ("The generalization of Student's
  problem when several different population variances are involved", Biometrika 34, 1947).
- All figures together: the procedure of Benjamini and Hochberg ("Controlling the false discovery rate", J. R. Stat.
  Soc. B 57, 1995). At most the share ``FALSE_SHARE`` of the verdicts is false on average. Where nothing has changed,
  every verdict is false: so then at most the share ``FALSE_SHARE`` of all *comparisons* has any.
- The interval of each change is widened to match (Benjamini and Yekutieli, "False discovery rate-adjusted multiple
  confidence intervals for selected parameters", J. Am. Stat. Assoc. 100, 2005): a figure's change is significant
  exactly if its interval does not hold "no change".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.comparison.estimates import Estimate
from gpumesh.bench.student_t import critical_value, tail_probability

# So of 20 pairs of equal results, at most one has a false verdict with a probability of 99 %.
FALSE_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Change:
    """How much a figure has changed, with the standard error of that and its degrees of freedom."""

    difference: float
    error: float
    df: float

    @property
    def p_value(self) -> float:
        """The probability of a difference at least like this one, if the figure has not changed."""
        if self.difference == 0:
            return 1.0
        return 0.0 if self.error == 0 else tail_probability(abs(self.difference) / self.error, self.df)

    def interval(self, error_probability: float) -> tuple[float, float]:
        """The interval of the difference that misses the true one with this probability."""
        width = self.error * critical_value(error_probability, self.df) if self.error > 0 else 0.0
        return self.difference - width, self.difference + width


def change_between(a: Estimate, b: Estimate) -> Change:
    """The change from ``a`` to ``b``, with the degrees of freedom of Welch and Satterthwaite."""
    variance_a, variance_b = a.error**2, b.error**2
    variance = variance_a + variance_b
    weight = variance_a**2 / a.df + variance_b**2 / b.df
    df = variance**2 / weight if weight > 0 else math.inf
    return Change(b.center - a.center, math.sqrt(variance), df)


def count_discoveries(p_values: Sequence[float]) -> int:
    """How many of the smallest p values are verdicts (Benjamini and Hochberg)."""
    found = 0
    for rank, p_value in enumerate(sorted(p_values), start=1):
        if p_value <= rank * FALSE_SHARE / len(p_values):
            found = rank
    return found


def verdict_threshold(p_values: Sequence[float]) -> float:
    """The largest p value of a verdict; 0 if there is no verdict and no p value is 0."""
    return count_discoveries(p_values) * FALSE_SHARE / len(p_values) if p_values else 0.0


def interval_errors(p_values: Sequence[float]) -> tuple[float, float]:
    """The probabilities of error of the intervals: of figures that have a verdict, and of those that have none.

    For those without a verdict it is that of the next one in the procedure, which none of them has reached.
    """
    discoveries, figures = count_discoveries(p_values), max(len(p_values), 1)
    return discoveries * FALSE_SHARE / figures, min(discoveries + 1, figures) * FALSE_SHARE / figures


def fisher_p_value(failed_a: int, count_a: int, failed_b: int, count_b: int) -> float:
    """Fisher's exact test: the probability of shares that differ at least so much, if both results fail equally often.

    (Fisher, "Statistical Methods for Research Workers", 1934; two-sided: all tables that are at most as probable.)
    """
    failed = failed_a + failed_b
    low, high = max(0, failed - count_b), min(failed, count_a)

    def log_probability(k: int) -> float:
        return _log_choose(count_a, k) + _log_choose(count_b, failed - k) - _log_choose(count_a + count_b, failed)

    observed = log_probability(failed_a)
    # The small number is for rounding errors: equally probable tables must count.
    return min(math.fsum(math.exp(p) for p in map(log_probability, range(low, high + 1)) if p <= observed + 1e-9), 1.0)


def _log_choose(n: int, k: int) -> float:
    """The logarithm of the number of ways to choose ``k`` of ``n``."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
