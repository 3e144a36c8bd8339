"""Measures how many streams run together on average while an answer is generated. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

SHARE_WINDOW_S = 30.0  # the time constant of ``BusyShare``
SHARE_AGE_S = 0.1


class ConcurrencyMark(NamedTuple):
    """A reading of a ``ConcurrencyMeter``: the time in seconds, and the sum of all streams' times up to then."""

    at: float
    stream_seconds: float


class ConcurrencyMeter:
    """Measures how many streams run together on average. Times are in seconds of the caller's clock."""

    __slots__ = ("_stream_seconds", "_updated_at", "streams")

    def __init__(self) -> None:
        self.streams = 0
        """The number of streams that run now."""
        self._stream_seconds = 0.0
        self._updated_at = 0.0

    def __repr__(self) -> str:
        return f"<ConcurrencyMeter {self.streams} streams>"

    def enter(self, now: float) -> None:
        """A stream has begun."""
        self._update(now)
        self.streams += 1

    def leave(self, now: float) -> None:
        """A stream has ended."""
        self._update(now)
        self.streams = max(self.streams - 1, 0)

    def mark(self, now: float) -> ConcurrencyMark:
        """A reading, from which ``mean_since`` counts. Take it after ``enter``."""
        self._update(now)
        return ConcurrencyMark(self._updated_at, self._stream_seconds)

    def mean_since(self, mark: ConcurrencyMark, now: float) -> float:
        """The mean number of streams since the mark; the present number if no time has passed. Take it before
        ``leave``."""
        self._update(now)
        elapsed_s = self._updated_at - mark.at
        return (self._stream_seconds - mark.stream_seconds) / elapsed_s if elapsed_s > 0 else float(self.streams)

    def _update(self, now: float) -> None:
        if now > self._updated_at:
            self._stream_seconds += self.streams * (now - self._updated_at)
            self._updated_at = now


class BusyShare:
    """Measures in which share of the time something runs, lately and since a mark. Times are in seconds of the caller's
    clock."""

    __slots__ = ("_busy_seconds", "_is_busy", "_share", "_updated_at")

    def __init__(self) -> None:
        self._is_busy = False
        self._busy_seconds = 0.0  # in all
        self._share = 0.0  # an exponential mean with the time constant SHARE_WINDOW_S
        self._updated_at = 0.0

    def __repr__(self) -> str:
        return f"<BusyShare {self._share:.2f}>"

    def start(self, now: float) -> None:
        self._update(now)
        self._is_busy = True

    def stop(self, now: float) -> None:
        self._update(now)
        self._is_busy = False

    def share(self, now: float) -> float:
        """The share of the last time in which it ran, from 0 to 1. It is not older than ``SHARE_AGE_S``."""
        if now - self._updated_at > SHARE_AGE_S:
            self._update(now)
        return self._share

    def busy_seconds(self, now: float) -> float:
        """For how many seconds it has run in all. The difference of two readings is the time between them."""
        self._update(now)
        return self._busy_seconds

    def _update(self, now: float) -> None:
        elapsed_s = now - self._updated_at
        if elapsed_s <= 0:
            return
        kept = math.exp(-elapsed_s / SHARE_WINDOW_S)
        self._share = self._share * kept + (1.0 - kept if self._is_busy else 0.0)
        if self._is_busy:
            self._busy_seconds += elapsed_s
        self._updated_at = now
