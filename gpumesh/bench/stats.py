"""Statistics of requests: percentiles, confidence intervals, TTFT, TPOT, rates, as the field defines them. Pure.

The terms and their sources:

- **TTFT**, time to first token: from sending a request to the first piece of its answer. It includes queueing,
  loading and prefill. (Databricks, "LLM inference performance engineering", 2023; MLPerf Inference v4.0.)
- **TPOT**, time per output token: ``(end-to-end - TTFT) / (tokens - 1)``, the mean of one request after its first
  token. (MLPerf Inference v4.0; vLLM's ``benchmark_serving``.)
- **ITL**, inter-token latency: each single gap between two pieces of an answer as they arrive. Servers may put more
  than one token into a piece; then ITL is larger than TPOT. (vLLM's ``benchmark_serving``, NVIDIA GenAI-Perf.)
- **End-to-end**: from sending a request to its last piece.
- **Tokens/s**: of one request, tokens ÷ generation time by the server's own clock (Ollama's ``eval_count`` ÷
  ``eval_duration``); of a stage, all output tokens ÷ wall time, and "total" with the prompts' tokens.
- **Goodput**: requests per second that met *all* of the service-level objectives. (Zhong et al., DistServe, OSDI 2024.)
- In an open loop every latency counts from the **intended** moment of sending. Otherwise a client that falls behind
  would hide the waits that it causes ("coordinated omission", Tene 2013).

Times are in ms, rates per second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Objective:
    """The service-level objectives of goodput: the largest TTFT and TPOT of a request that counts, in ms.

    The defaults are those of MLPerf Inference v4.0 for Llama 2 70B as a server.
    """

    ttft_ms: float = 2000.0
    tpot_ms: float = 200.0


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """The summary of a sample of ``n`` values. A percentile is ``None`` if the sample is too small for it.

    ``supports_percentile`` decides that. ``p50_low`` and ``p50_high`` are the ends of the 95 % confidence interval of
    the median (``median_interval``).
    """

    n: int
    mean: float | None = None
    min: float | None = None
    max: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    p50_low: float | None = None
    p50_high: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """The 95 % confidence interval of a figure. ``batches``: the number of values that it comes from.

    These values are batches of requests of one run, or the figures of repeated runs.
    """

    low: float
    high: float
    batches: int


NO_VALUES = SampleSummary(0)
"""The summary of an empty sample."""


def supports_percentile(n: int, share: float) -> bool:
    """Whether a sample of ``n`` values has this percentile: at least one value must be larger than the percentile.

    ``share`` is 0.9 for p90. p50 needs 2 values, p90 needs 10, p99 needs 100. With fewer values the "p99" would just be
    the maximum.
    """
    values_beyond = n * (1.0 - share)
    # 10 * (1 - 0.9) is 0.99999…: because of this rounding error, a little less than 1 is enough.
    return values_beyond >= 1.0 - 1e-9


def percentile(ordered: Sequence[float], share: float) -> float:
    """The percentile of a sorted sample by nearest rank (type 1 of Hyndman and Fan, 1996); ``share`` is 0.9 for p90.

    It is always a measured value, never an interpolated value. Raises ``ValueError`` for an empty sample.
    """
    if not ordered:
        raise ValueError("an empty sample has no percentiles")
    # 0.07 * 100 is 7.000000000000001: without the subtraction, this rounding error would raise the rank by one.
    rank = math.ceil(share * len(ordered) - 1e-9)
    return ordered[max(rank, 1) - 1]


def median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the median of a sorted sample, without assumptions about the distribution.

    The ends of the interval are two values of the sample, equally far from its two ends. The number of values below the
    true median has a binomial distribution. The interval is the narrowest interval that misses the median with a
    probability of at most 2.5 % on each side (Conover, "Practical Nonparametric Statistics"). ``None`` for fewer than 6
    values: even the whole sample does not reach 95 %.
    """
    n = len(ordered)
    rank, _ = median_rank(n)
    if rank == 0:
        return None
    return ordered[rank - 1], ordered[n - rank]  # number ``rank`` from the start (counted from 1), and from the end


@lru_cache(maxsize=1024)
def median_rank(n: int) -> tuple[int, float]:
    """The rank of the lower end of ``median_interval`` for ``n`` values, and the interval's exact probability of error.

    The rank counts from 1; it is 0 for fewer than 6 values, which have no such interval.
    """
    if n < 6:
        return 0, 1.0
    tail_probability = 0.0  # that fewer than ``rank`` values lie below the true median
    # Ranks that lie 20 standard deviations (of ``sqrt(n) / 2``) below the middle have no probability worth counting.
    rank = max(n // 2 - 10 * math.isqrt(n), 0)
    while rank < n:
        # The probability that exactly ``rank`` values lie below the median: n choose rank, times 0.5 ** n. Computed
        # with logarithms, because 0.5 ** n underflows for large samples.
        log_choices = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
        probability = math.exp(log_choices + n * math.log(0.5))
        if tail_probability + probability > 0.025:
            break
        tail_probability += probability
        rank += 1
    return rank, 2.0 * tail_probability


def summarize_sample(values: Iterable[float | None]) -> SampleSummary:
    """Summarizes the known values. Values that are ``None`` or not finite are left out, and not counted in ``n``."""
    ordered = sorted(value for value in values if value is not None and math.isfinite(value))
    n = len(ordered)
    if n == 0:
        return NO_VALUES
    p50_low, p50_high = median_interval(ordered) or (None, None)
    return SampleSummary(
        n=n,
        mean=math.fsum(ordered) / n,
        min=ordered[0],
        max=ordered[-1],
        p50=percentile(ordered, 0.5) if supports_percentile(n, 0.5) else None,
        p90=percentile(ordered, 0.9) if supports_percentile(n, 0.9) else None,
        p99=percentile(ordered, 0.99) if supports_percentile(n, 0.99) else None,
        p50_low=p50_low,
        p50_high=p50_high,
    )


def tpot_ms(ttft_ms: float | None, end_to_end_ms: float | None, tokens: int | None) -> float | None:
    """Computes the time per output token in ms. ``None`` if a value is unknown, or for fewer than two tokens."""
    if ttft_ms is None or end_to_end_ms is None or tokens is None or tokens < 2:
        return None
    return (end_to_end_ms - ttft_ms) / (tokens - 1)


def gaps_ms(arrivals_s: Sequence[float]) -> tuple[float, ...]:
    """Computes the inter-token latencies of one answer in ms, from the arrival times of its pieces in seconds."""
    return tuple((later - earlier) * 1000.0 for earlier, later in itertools.pairwise(arrivals_s))


def rate(amount: float, seconds: float) -> float | None:
    """Computes the amount per second. ``None`` if no time has passed: then the rate is unknown, not infinite."""
    return amount / seconds if seconds > 0 else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """Computes ``part ÷ whole``. ``None`` if one of the two is unknown, or if ``whole`` is 0."""
    if part is None or not whole:
        return None
    return part / whole
