"""Measures how fast a node generates: tokens/s over the last seconds, and smoothed rates per model.

The meter counts frames: an NDJSON line or an SSE event of a generated answer is about one token. Its rate is for people
who watch the mesh. The smoothed rates rank nodes: they use the exact counters that the server sends at the end of each
answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

WINDOW_S = 5.0  # the meter's rate is a mean over this time
BUCKET_S = 0.25  # counts within this time are added up
SMOOTHING = 0.3  # weight of the newest value: after two more values an old mean has lost half of its weight


class RateMeter:
    """Tokens per second over a sliding window. A bucket is its start time, then its count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: deque[list[float]] = deque()

    def add(self, count: int) -> None:
        now = self._clock()
        if self._buckets and now - self._buckets[-1][0] < BUCKET_S:
            self._buckets[-1][1] += count
            return
        self._buckets.append([now, float(count)])
        self._trim(now)

    def _trim(self, now: float) -> None:
        while self._buckets and now - self._buckets[0][0] > WINDOW_S:
            self._buckets.popleft()

    def rate(self) -> float:
        """Tokens per second since the first count in the window, divided by at least one second."""
        now = self._clock()
        self._trim(now)
        if not self._buckets:
            return 0.0
        span = max(now - self._buckets[0][0], 1.0)
        return sum(count for _, count in self._buckets) / span


class Smoothed:
    """Exponentially weighted means by name. Beyond ``max_names`` the name that was added longest ago is forgotten."""

    def __init__(self, max_names: int = 256) -> None:
        self._max_names = max_names
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        old = self.values.pop(name, None)
        self.values[name] = value if old is None else old + SMOOTHING * (value - old)
        while len(self.values) > self._max_names:
            self.values.pop(next(iter(self.values)))
