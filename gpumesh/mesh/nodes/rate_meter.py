"""Measures how fast a node generates: tokens/s over the last seconds, and smoothed rates per model.

The meter counts frames: an NDJSON line or an SSE event of a generated answer is about one token. Its rate is for people
who watch the mesh. The smoothed rates rank nodes: they use the exact counters that the server sends at the end of each
answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 5.0  # the meter's rate is a mean over this time
BUCKET_S = 0.25  # counts within this time are added up in one bucket
SMOOTHING = 0.3  # weight of the newest value: after two more values an old mean has lost half of its weight


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
        """The mean of tokens per second, from the first count in the window to now. A time of less than 1 s counts as
        1 s: right after a first token the rate would be far too high."""
        now = self._clock()
        self._trim(now)
        if not self._buckets:
            return 0.0
        span_s = max(now - self._buckets[0].started_at, 1.0)
        return sum(bucket.count for bucket in self._buckets) / span_s


class Smoothed:
    """Exponentially weighted means of values, by name. With more than ``max_names`` names, the name that was added to
    longest ago is forgotten."""

    def __init__(self, max_names: int = 256) -> None:
        self._max_names = max_names
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Adds a value to the mean of ``name``, and makes this name the newest."""
        old_mean = self.values.pop(name, None)
        self.values[name] = value if old_mean is None else old_mean + SMOOTHING * (value - old_mean)
        while len(self.values) > self._max_names:
            oldest_name = next(iter(self.values))
            del self.values[oldest_name]
