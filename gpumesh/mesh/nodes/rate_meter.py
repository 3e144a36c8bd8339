"""Measures how fast a node generates: tokens/s over the last seconds.

The meter counts frames: an NDJSON line or an SSE event of a generated answer is about one token. Its rate is for people
who watch the mesh. The rates that rank nodes are in ``gpumesh/balancer/rates/``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 5.0  # the meter's rate is a mean over this time
BUCKET_S = 0.25  # counts within this time are added up in one bucket


@dataclass(slots=True)
class _Bucket:
    """The number of tokens that were counted within ``BUCKET_S`` after ``started_at``."""

    started_at: float
    count: int


class RateMeter:
    """Measures tokens per second over a sliding window of ``WINDOW_S``. ``clock`` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: deque[_Bucket] = deque()

    def add(self, count: int) -> None:
        """Counts tokens that have come now."""
        now = self._clock()
        if self._buckets and now - self._buckets[-1].started_at < BUCKET_S:
            self._buckets[-1].count += count
            return
        self._buckets.append(_Bucket(now, count))
        self._trim(now)

    def _trim(self, now: float) -> None:
        """Removes the buckets that are older than the window."""
        while self._buckets and now - self._buckets[0].started_at > WINDOW_S:
            self._buckets.popleft()

    def rate(self) -> float:
        """The mean of tokens per second, from the first count in the window to now; 0 if nothing was counted. A time of
        less than 1 s counts as 1 s, because right after a first token the rate would be far too high."""
        now = self._clock()
        self._trim(now)
        if not self._buckets:
            return 0.0
        span_s = max(now - self._buckets[0].started_at, 1.0)
        return sum(bucket.count for bucket in self._buckets) / span_s
