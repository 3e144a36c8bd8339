"""``ActivityMeter``: how many answers a node writes, and how many prompts it reads, now and on the mean. Pure."""

from __future__ import annotations

import math

SHARE_WINDOW_S = 30.0  # the time constant of the mean that ``read_share`` gives
SHARE_AGE_S = 0.1  # the result of ``read_share`` may be this old


class ActivityMeter:
    """Measures what one node does. Times are in seconds of the caller's clock.

    ``streams`` is the number of answers that are written now, ``reading`` the number of prompts that are read now.

    Three sums in seconds grow with time: the times of all streams, the times of the reading of all prompts, and the
    time in which any prompt is read. The mean since an earlier event is the growth of a sum since that event, divided
    by the time. So the methods for events return the present sums, and the questions take them as arguments.

    Two more sums say what one request has used, if each moment of the GPUs is shared evenly by the requests that are
    there: ``gpu_s``, in seconds of GPUs, and ``energy_j``, by the power that was reported last (``note_gpus``). What a
    request has used is the growth of the sums while it was there.

    The methods are called several times for each request. So one method does all that belongs to one event."""

    __slots__ = (
        "_busy_at_share",
        "_busy_seconds",
        "_gpus",
        "_power_w",
        "_read_seconds",
        "_read_share",
        "_share_at",
        "_stream_seconds",
        "_updated_at",
        "energy_j",
        "gpu_s",
        "reading",
        "streams",
    )

    def __init__(self) -> None:
        self.streams = 0
        self.reading = 0
        # Sums over time: of the streams, of the prompts that are read, and of the time in which any prompt is read.
        self._stream_seconds = 0.0
        self._read_seconds = 0.0
        self._busy_seconds = 0.0
        self._updated_at = 0.0  # the time up to which all sums count
        self.gpu_s = 0.0
        self.energy_j = 0.0
        self._gpus = 1
        self._power_w = 0.0  # of all GPUs together, as reported last
        self._read_share = 0.0  # an exponential mean, as it was at ``_share_at``
        self._share_at = 0.0  # when ``_read_share`` was computed last
        self._busy_at_share = 0.0  # ``_busy_seconds`` at that time

    def __repr__(self) -> str:
        return f"<ActivityMeter {self.streams} streams, {self.reading} prompts>"

    # -- events --------------------------------------------------------------------------------------------------

    def begin_read(self, now: float) -> float:
        """Notes that a prompt is read from now on. Returns the sum that ``mean_reads`` needs."""
        if now > self._updated_at:
            self._update(now)
        self.reading += 1
        return self._read_seconds

    def end_read(self, now: float) -> None:
        """Notes that a prompt has been read, or that its request has ended before that."""
        if now > self._updated_at:
            self._update(now)
        self.reading -= 1

    def begin_stream(self, now: float) -> tuple[float, float]:
        """Notes that an answer is written from now on. Returns the sums that ``mean_streams`` and ``busy_share``
        need, in this order."""
        if now > self._updated_at:
            self._update(now)
        self.streams += 1
        return self._stream_seconds, self._busy_seconds

    def end_stream(self, now: float) -> None:
        """Notes that an answer has ended."""
        if now > self._updated_at:
            self._update(now)
        self.streams -= 1

    def note_gpus(self, now: float, count: int, power_w: float) -> None:
        """Notes how many GPUs the node has, and their power together in W; 0: not known. A node without known GPUs
        counts as one GPU."""
        if now > self._updated_at:
            self._update(now)
        self._gpus, self._power_w = max(count, 1), power_w

    # -- questions -----------------------------------------------------------------------------------------------

    def mean_reads(self, since: float, read_seconds: float, now: float) -> float:
        """The mean number of prompts that were read at once after ``since``; at least 1. ``read_seconds``: the result
        of ``begin_read`` at the time ``since``. Must be called before ``end_read``."""
        if now > self._updated_at:
            self._update(now)
        return max((self._read_seconds - read_seconds) / (now - since), 1.0) if now > since else 1.0

    def mean_streams(self, since: float, stream_seconds: float, now: float) -> float:
        """The mean number of answers that were written at once after ``since``; at least 1. ``stream_seconds``: the
        result of ``begin_stream`` at the time ``since``. Must be called before ``end_stream``."""
        if now > self._updated_at:
            self._update(now)
        if now <= since:
            return max(float(self.streams), 1.0)
        return max((self._stream_seconds - stream_seconds) / (now - since), 1.0)

    def busy_share(self, since: float, busy_seconds: float, now: float) -> float:
        """The share of the time after ``since`` in which any prompt was read; from 0 to 1. ``busy_seconds``: the result
        of ``begin_stream`` at the time ``since``."""
        if now <= since:
            return 0.0
        if now > self._updated_at:
            self._update(now)
        return min((self._busy_seconds - busy_seconds) / (now - since), 1.0)

    def read_share(self, now: float) -> float:
        """The share of the time in which any prompt is read, from 0 to 1: an exponential mean over about the last
        ``SHARE_WINDOW_S``. It may be ``SHARE_AGE_S`` old."""
        elapsed_s = now - self._share_at
        if elapsed_s > SHARE_AGE_S:
            if now > self._updated_at:
                self._update(now)
            old_weight = math.exp(-elapsed_s / SHARE_WINDOW_S)
            share = (self._busy_seconds - self._busy_at_share) / elapsed_s
            self._read_share = self._read_share * old_weight + min(share, 1.0) * (1.0 - old_weight)
            self._share_at, self._busy_at_share = now, self._busy_seconds
        return self._read_share

    def _update(self, now: float) -> None:
        """Lets the sums grow up to now."""
        elapsed_s = now - self._updated_at
        self._updated_at = now
        streams, reading = self.streams, self.reading
        if streams or reading:
            share_s = elapsed_s / (streams + reading)
            self.gpu_s += share_s * self._gpus
            self.energy_j += share_s * self._power_w
            self._stream_seconds += streams * elapsed_s
        if reading:
            self._read_seconds += reading * elapsed_s
            self._busy_seconds += elapsed_s
