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


@dataclass(frozen=True, slots=True)
class Objective:
    """The service-level objectives of goodput. The defaults are MLPerf Inference v4.0's for Llama 2 70B as a server."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 200.0


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """The summary of a sample. ``p50``, ``p90``, ``p99`` are ``None`` if the sample is too small
    (``supports_percentile``).

    ``p50_low`` and ``p50_high``: the 95 % confidence interval of the median (``median_interval``).
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


def supports_percentile(n: int, share: float) -> bool:
    """Whether a sample of ``n`` values has this percentile: at least one value must lie beyond it.

    p50 needs 2 values, p90 needs 10, p99 needs 100. With fewer values the "p99" would just be the maximum.
    """
    # 10 * (1 - 0.9) is 0.99999…: this rounding error must not deny ten values their p90.
    return n * (1.0 - share) >= 1.0 - 1e-9


def percentile(ordered: Sequence[float], share: float) -> float:
    """The percentile by nearest rank (type 1 of Hyndman and Fan, 1996): always a measured value, never an interpolated
    one. ``share`` is 0.9 for p90.

    Raises ``ValueError`` for an empty sample.
    """
    if not ordered:
        raise ValueError("an empty sample has no percentiles")
    # 0.07 * 100 is 7.000000000000001: without the subtraction, this rounding error would raise the rank by one.
    rank = math.ceil(share * len(ordered) - 1e-9)
    return ordered[max(rank, 1) - 1]


def median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the median by order statistics, without assumptions about the distribution.

    From the binomial distribution (Conover, "Practical Nonparametric Statistics"): the innermost pair of ranks beyond
    which lie at most 2.5 % on each side. ``None`` for fewer than 6 values: no pair of ranks reaches 95 %.
    """
    n = len(ordered)
    if n < 6:
        return None
    tail = 0.0
    rank = 0
    while rank < n:
        # The probability that exactly ``rank`` values lie below the median. In log space, because 0.5 ** n underflows
        # for large samples.
        probability = math.exp(
            math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1) + n * math.log(0.5),
        )
        if tail + probability > 0.025:
            break
        tail += probability
        rank += 1
    return ordered[rank - 1], ordered[n - rank]


def summarize_sample(values: Iterable[float | None]) -> SampleSummary:
    """The summary of the known values. Unknown values are left out, and not counted in ``n``."""
    ordered = sorted(value for value in values if value is not None and math.isfinite(value))
    n = len(ordered)
    if n == 0:
        return SampleSummary(0)
    interval = median_interval(ordered)
    return SampleSummary(
        n=n,
        mean=math.fsum(ordered) / n,
        min=ordered[0],
        max=ordered[-1],
        p50=percentile(ordered, 0.5) if supports_percentile(n, 0.5) else None,
        p90=percentile(ordered, 0.9) if supports_percentile(n, 0.9) else None,
        p99=percentile(ordered, 0.99) if supports_percentile(n, 0.99) else None,
        p50_low=interval[0] if interval else None,
        p50_high=interval[1] if interval else None,
    )


def tpot_ms(ttft_ms: float | None, end_to_end_ms: float | None, tokens: int | None) -> float | None:
    """Time per output token. ``None`` for an answer of fewer than two tokens."""
    if ttft_ms is None or end_to_end_ms is None or tokens is None or tokens < 2:
        return None
    return (end_to_end_ms - ttft_ms) / (tokens - 1)


def gaps_ms(arrivals_s: Sequence[float]) -> tuple[float, ...]:
    """The inter-token latencies of one answer, from the arrival times of its pieces."""
    return tuple((later - earlier) * 1000.0 for earlier, later in itertools.pairwise(arrivals_s))


def rate(amount: float, seconds: float) -> float | None:
    """The amount per second. ``None`` if no time passed: then the rate is unknown, not infinite."""
    return amount / seconds if seconds > 0 else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """``part ÷ whole``. ``None`` if either is unknown or ``whole`` is 0."""
    return part / whole if part is not None and whole else None
