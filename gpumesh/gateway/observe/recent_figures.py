"""``RecentFigures``: what clients have felt in the last minutes, from the counters of the mesh and of the gateway.

The counters are read a few times a minute, so no request pays for this.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gpumesh.gateway.observe.metrics import TTFT_BOUNDS, RequestMetrics
from gpumesh.mesh.request_counters import RequestCounters

WINDOW_S = 300.0


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of the last ``window_s`` seconds. Times are in ms, of answers that the gateway has streamed; ``None``
    if there was none. ``ended`` and ``failed`` (a part of it) count the requests of the whole mesh, also of commands
    that do not come through the gateway."""

    window_s: float
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None
    ended: int
    failed: int


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    ttft_counts: tuple[int, ...]
    ended: int
    failed: int


class RecentFigures:
    """Samples the counters, and compares the newest sample with the oldest of the last ``WINDOW_S`` seconds."""

    def __init__(self, metrics: RequestMetrics, counters: RequestCounters) -> None:
        self._metrics = metrics
        self._counters = counters
        self._samples: deque[_Sample] = deque()

    def sample(self, now: float) -> Figures:
        """Reads the counters, and returns the figures up to ``now``, in seconds of any clock."""
        counts = [0] * (len(TTFT_BOUNDS) + 1)
        for model in self._metrics.models.values():
            for bucket, count in enumerate(model.ttft.counts):
                counts[bucket] += count
        served, failed, cancelled = self._counters.served, self._counters.failed, self._counters.cancelled
        newest = _Sample(now, tuple(counts), served + failed + cancelled, failed)
        self._samples.append(newest)
        while len(self._samples) > 1 and self._samples[1].at <= now - WINDOW_S:
            self._samples.popleft()
        oldest = self._samples[0]
        recent = [count - before for count, before in zip(newest.ttft_counts, oldest.ttft_counts, strict=True)]
        return Figures(
            window_s=round(now - oldest.at, 1),
            ttft_p50_ms=_quantile_ms(recent, 0.5),
            ttft_p90_ms=_quantile_ms(recent, 0.9),
            ended=newest.ended - oldest.ended,
            failed=newest.failed - oldest.failed,
        )


def _quantile_ms(counts: list[int], quantile: float) -> float | None:
    """The quantile of the times in these buckets, as Prometheus computes it: linear within a bucket. Above the last
    bound: that bound. ``None`` if there are no times."""
    total = sum(counts)
    if not total:
        return None
    rank, below, lower_s = quantile * total, 0, 0.0
    for count, bound_s in zip(counts, TTFT_BOUNDS, strict=False):
        if below + count >= rank:
            return round((lower_s + (bound_s - lower_s) * (rank - below) / count) * 1000.0, 1)
        below, lower_s = below + count, bound_s
    return TTFT_BOUNDS[-1] * 1000.0
