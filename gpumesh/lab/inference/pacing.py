"""When the tokens of a simulated GPU are due, although its streams slow each other down and come and go at any time.

The GPU has a clock of its own, the decode clock. It counts seconds of decoding as a stream alone on the GPU would need
them. The more streams decode, the slower it runs; while it is paused it stands still. So each stream has fixed times
on the decode clock: token ``n`` is due at ``start + n / rate``, and no stream has to know of the others.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable

EARLY_S = 1e-3
"""A timer may fire so much too early: uvloop counts in milliseconds. The token is then due; the next tokens are
exact."""


class DecodeClock:
    """A clock that runs at ``1 / (1 + share * (streams - 1))`` seconds in each second of ``clock``.

    ``share`` is what each further stream adds to the time of a token, as a share of the time that a stream alone needs:
    0 if streams do not slow each other down, 1 if they only take turns. All calls must come from one event loop.
    """

    def __init__(self, share: float = 0.0, *, clock: Callable[[], float]) -> None:
        self._share = share
        self._clock = clock
        self._streams = 0
        self._pauses = 0  # how many have begun and not ended; with any, the clock stands
        self.read_at = clock()
        """The time on the other clock when this clock was read last."""
        self._decoded_s = self.read_at  # with one stream at a time, both clocks show the same
        self._order = itertools.count()
        # A heap of (due, number, future). The number decides if two waiters are due at once: futures have no order.
        self._waiters: list[tuple[float, int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None  # runs until the first waiter's time

    @property
    def speed(self) -> float:
        """How fast this clock runs: 1 as fast as the other clock, 0 while it is paused."""
        if self._pauses:
            return 0.0
        return 1.0 / (1.0 + self._share * max(0, self._streams - 1))

    def read(self) -> float:
        """The time on this clock, in seconds."""
        now = self._clock()
        self._decoded_s += (now - self.read_at) * self.speed
        self.read_at = now
        return self._decoded_s

    def add_stream(self) -> None:
        """A stream begins to decode: the others become slower."""
        self._change(streams=+1)

    def remove_stream(self) -> None:
        """A stream has ended: the others become faster."""
        self._change(streams=-1)

    def pause(self) -> None:
        """Stops the clock until ``resume`` was called as often as ``pause``."""
        self._change(pauses=+1)

    def resume(self) -> None:
        """Ends one pause."""
        self._change(pauses=-1)

    async def wait_until(self, due: float) -> None:
        """Waits until this clock shows the time ``due``."""
        if self.read() >= due:
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (due, next(self._order), future))
        _due, _order, first_future = self._waiters[0]
        if first_future is future:  # the timer was set for a later waiter, or is not set
            self._set_timer()
        await future

    def _change(self, *, streams: int = 0, pauses: int = 0) -> None:
        """Adds to the numbers of streams and pauses, and sets the timer again if the clock's speed has changed."""
        old_speed = self.speed
        self.read()  # counts the time until now at the old speed
        self._streams += streams
        self._pauses += pauses
        if self._waiters and self.speed != old_speed:
            self._set_timer()

    def _set_timer(self) -> None:
        """Sets the timer for the first waiter. A paused clock needs none: ``resume`` sets it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiters and self.speed > 0:
            first_due, _order, _future = self._waiters[0]
            wait_s = (first_due - self.read()) / self.speed
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._wake_due)

    def _wake_due(self) -> None:
        """Wakes the waiters whose time has come, and sets the timer for the next one."""
        self._timer = None
        now = self.read() + EARLY_S * self.speed  # ``EARLY_S`` on this clock
        while self._waiters and self._waiters[0][0] <= now:
            _due, _order, future = heapq.heappop(self._waiters)
            if not future.done():  # the waiter may have been cancelled
                future.set_result(None)
        self._set_timer()


class Pacer:
    """Waits for the time when each token of an answer is due, from now on: token ``n`` after ``n / rate`` seconds of
    decoding. If one token is late, the next tokens are not.

    ``total`` is the number of tokens, ``rate`` is that of a stream alone in tokens/s. ``sent`` is the number of tokens
    that the caller has sent, or will send now.
    """

    def __init__(self, total: int, rate: float, decode_clock: DecodeClock) -> None:
        self._total = total
        self._rate = rate
        self._decode_clock = decode_clock
        # The start of decoding, first in seconds of the decode clock, then of the clock behind it.
        self._decode_start_s = decode_clock.read()
        self._started_at = decode_clock.read_at
        self.sent = 0

    async def wait_due(self) -> int:
        """Waits until the next token is due. Returns how many tokens of the answer are due then, and sets ``sent``.

        The number includes the tokens that were sent before. It grows by more than 1 if the caller is late.
        """
        if math.isinf(self._rate):  # all tokens are due at once
            self.sent = self._total
            return self.sent
        await self._decode_clock.wait_until(self._decode_start_s + (self.sent + 1) / self._rate)
        decoded_s = self._decode_clock.read() - self._decode_start_s
        due = int(decoded_s * self._rate + 1e-6)  # with 1e-6, a rounding error does not hide a token that is due
        self.sent = min(self._total, max(self.sent + 1, due))
        return self.sent

    def measure_decoding(self) -> float:
        """The seconds from the start until the last token was due. Must be called when the last token was sent."""
        if math.isinf(self._rate):
            return 0.0
        # How late this call is, on the decode clock; below 0 if a timer was early.
        late_s = self._decode_clock.read() - self._decode_start_s - self._total / self._rate
        elapsed_s = self._decode_clock.read_at - self._started_at
        speed = self._decode_clock.speed
        if speed == 0:  # paused: nobody knows for how long, so the lateness is not subtracted
            return elapsed_s
        return elapsed_s - late_s / speed
