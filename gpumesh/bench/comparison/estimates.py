"""How sure a figure of a result is: its centre, its standard error and the degrees of freedom of this error. Pure.

A result with several runs has the spread *between* its runs. This is the one that counts: a second measurement differs
from the first by it. A result of a single run has only the spread *within* the run:

- a median has the error that its distribution-free interval gives (Price and Bonett, "Distribution-free confidence
  intervals for difference and ratio of medians", J. Stat. Comput. Simul. 72, 2002),
- a rate that of batch means (``figures.rate_intervals``).

What changes from run to run (clock, temperature, placement) is not in there. So ``ASSUMED_DRIFT`` is added to it, as a
component of uncertainty that is known from elsewhere ("type B" in the "Guide to the Expression of Uncertainty in
Measurement", JCGM 100:2008, 4.3).

Figures are compared as ratios, so errors are those of logarithms. A figure that can be 0 has no logarithm: then the
errors are those of the values (``is_log``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpumesh.bench.stats import Interval, SampleSummary, median_rank
from gpumesh.bench.student_t import critical_value, mean_of_runs, spread_of

# The standard deviation from run to run, as a share of the figure, that is taken for a result of a single run. It is an
# assumption: the lab's runs differ by 0.1 to 0.3 % (TPOT), and clocks and temperatures make those of GPUs differ more.
ASSUMED_DRIFT = 0.01


@dataclass(frozen=True, slots=True)
class Measurement:
    """A figure as one result has it: the values of its runs and, of a single run, the error within that run.

    ``error`` is the standard error as a share of the value, ``df`` its degrees of freedom; ``None`` if it is unknown.
    ``left_out`` is the number of the run that is an outlier, and so not among the values.
    """

    values: tuple[float, ...]
    error: float | None = None
    df: float = math.inf
    left_out: int | None = None

    @property
    def value(self) -> float | None:
        """The figure of the whole result: the mean of its runs."""
        return mean_of_runs(self.values)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its uncertainty. ``center`` and ``error`` are those of its logarithm if ratios are compared."""

    center: float
    error: float
    df: float


def median_error(sample: SampleSummary) -> tuple[float | None, float]:
    """The standard error of a sample's median as a share of it, and its degrees of freedom.

    The error is ``None`` if the sample has no interval of its median. It is the interval's half width, divided by the
    normal quantile of the interval's exact probability of error (Price and Bonett).
    """
    low, high, median = sample.p50_low, sample.p50_high, sample.p50
    if low is None or high is None or not median:
        return None, math.inf
    _, error_probability = median_rank(sample.n)
    quantile = critical_value(error_probability, math.inf)
    width = math.log(high / low) if low > 0 else (high - low) / median
    return width / 2.0 / quantile, sample.n - 1


def rate_error(rate: float | None, interval: Interval | None) -> tuple[float | None, float]:
    """The standard error of a rate as a share of it, from its interval, and its degrees of freedom."""
    if not rate or interval is None:
        return None, math.inf
    df = interval.batches - 1
    return (interval.high - rate) / rate / critical_value(0.05, df), df


def estimate_pair(a: Measurement, b: Measurement, *, is_log: bool) -> tuple[Estimate, Estimate] | None:
    """The estimates of a figure in both results; ``None`` if one of them is unknown or has no known error.

    If only one result has several runs, the other is taken for one more run of the same spread.
    """
    runs_a, runs_b = _estimate_runs(a, is_log=is_log), _estimate_runs(b, is_log=is_log)
    estimate_a = _estimate_single(a, runs_b, len(b.values), is_log=is_log) if runs_a is None else runs_a
    estimate_b = _estimate_single(b, runs_a, len(a.values), is_log=is_log) if runs_b is None else runs_b
    return None if estimate_a is None or estimate_b is None else (estimate_a, estimate_b)


def _estimate_runs(measurement: Measurement, *, is_log: bool) -> Estimate | None:
    """The estimate from the spread between runs; ``None`` for a single run."""
    if len(measurement.values) < 2:
        return None
    spread = spread_of([math.log(value) if is_log else value for value in measurement.values])
    return Estimate(spread.mean, spread.error, spread.df)


def _estimate_single(
    measurement: Measurement, other: Estimate | None, other_runs: int, *, is_log: bool
) -> Estimate | None:
    """The estimate of a single run. ``other``: that of the other result, if that one has several runs.

    Its error is that within the run and that from run to run: as the other result has it, or ``ASSUMED_DRIFT``.
    """
    if not measurement.values or (measurement.error is None and other is None):
        return None
    (value,) = measurement.values
    center, unit = (math.log(value), 1.0) if is_log else (value, abs(value))
    if other is not None:
        # ``other.error`` is that of a mean: the spread of single runs is the square root of their number times that.
        return Estimate(center, other.error * math.sqrt(other_runs), other.df)
    within = (measurement.error or 0.0) * unit
    error = math.hypot(within, ASSUMED_DRIFT * unit)
    # Welch and Satterthwaite: the assumed part counts as known.
    df = measurement.df * (error / within) ** 4 if within > 0 else math.inf
    return Estimate(center, error, df)
