"""``ActivityMeter``: how many answers a node writes, and how many prompts it reads, now and on the mean. Pure."""

from __future__ import annotations

import math

SHARE_WINDOW_S = 30.0  # the time constant of ``read_share``
SHARE_AGE_S = 0.1


class ActivityMeter:
    """Measures what one node does. Times are in seconds of the caller's clock.

    A mean since some time is the difference of two readings of a sum, divided by the time between them. There are three
    such sums: of the times of all streams, of the times of all prompts that are read, and of the time in which any
    prompt is read. ``streams`` are the answers that are written now, ``reading`` the prompts that are read now.

    It is asked several times for each request, so one method does what belongs to one event."""

    __slots__ = (
        "_busy_at_share",
        "_busy_seconds",
        "_read_seconds",
        "_read_share",
        "_share_at",
        "_stream_seconds",
        "_updated_at",
        "reading",
        "streams",
    )

    def __init__(self) -> None:
        self.streams = 0
        self.reading = 0
        self._stream_seconds = 0.0
        self._read_seconds = 0.0
        self._busy_seconds = 0.0
        self._updated_at = 0.0
        self._read_share = 0.0  # an exponential mean, as it was at ``_share_at``
        self._share_at = 0.0
        self._busy_at_share = 0.0

    def __repr__(self) -> str:
        return f"<ActivityMeter {self.streams} streams, {self.reading} prompts>"

    # -- events --------------------------------------------------------------------------------------------------

    def begin_read(self, now: float) -> float:
        """A prompt is read from now on. Returns the sum from which ``mean_reads`` counts."""
        if now > self._updated_at:
            self._update(now)
        self.reading += 1
        return self._read_seconds

    def end_read(self, now: float) -> None:
        """A prompt has been read, or its request has ended before."""
        if now > self._updated_at:
            self._update(now)
        self.reading -= 1

    def begin_stream(self, now: float) -> tuple[float, float]:
        """An answer is written from now on. Returns the sums from which ``mean_streams`` and ``busy_share`` count."""
        if now > self._updated_at:
            self._update(now)
        self.streams += 1
        return self._stream_seconds, self._busy_seconds

    def end_stream(self, now: float) -> None:
        """An answer has ended."""
        if now > self._updated_at:
            self._update(now)
        self.streams -= 1

    # -- questions -----------------------------------------------------------------------------------------------

    def mean_reads(self, since: float, read_seconds: float, now: float) -> float:
        """The mean number of prompts that were read at once since the time of a reading; at least 1. Ask it before
        ``end_read``."""
        if now > self._updated_at:
            self._update(now)
        return max((self._read_seconds - read_seconds) / (now - since), 1.0) if now > since else 1.0

    def mean_streams(self, since: float, stream_seconds: float, now: float) -> float:
        """The mean number of answers that were written at once since the time of a reading; at least 1. Ask it before
        ``end_stream``."""
        if now > self._updated_at:
            self._update(now)
        if now <= since:
            return max(float(self.streams), 1.0)
        return max((self._stream_seconds - stream_seconds) / (now - since), 1.0)

    def busy_share(self, since: float, busy_seconds: float, now: float) -> float:
        """The share of the time since a reading in which any prompt was read, from 0 to 1."""
        if now <= since:
            return 0.0
        if now > self._updated_at:
            self._update(now)
        return min((self._busy_seconds - busy_seconds) / (now - since), 1.0)

    def read_share(self, now: float) -> float:
        """The share of the last time in which any prompt was read, from 0 to 1. It is not older than
        ``SHARE_AGE_S``."""
        elapsed_s = now - self._share_at
        if elapsed_s > SHARE_AGE_S:
            if now > self._updated_at:
                self._update(now)
            kept = math.exp(-elapsed_s / SHARE_WINDOW_S)
            share = (self._busy_seconds - self._busy_at_share) / elapsed_s
            self._read_share = self._read_share * kept + min(share, 1.0) * (1.0 - kept)
            self._share_at, self._busy_at_share = now, self._busy_seconds
        return self._read_share

    def _update(self, now: float) -> None:
        elapsed_s = now - self._updated_at
        self._updated_at = now
        self._stream_seconds += self.streams * elapsed_s
        if self.reading:
            self._read_seconds += self.reading * elapsed_s
            self._busy_seconds += elapsed_s
