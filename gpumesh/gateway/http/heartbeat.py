"""Sends a sign of life to clients whose stream is silent, so that proxies between do not take the connection for dead.

A request may wait minutes for a slot, for a model to load, or until its prompt is read. nginx and the balancers of
clouds cut a connection on which nothing has moved for 30 to 60 s. So bytes without a meaning go out meanwhile: a
comment in a stream of events, a blank between two lines of JSON.

All heartbeats share one timer: nearly all requests have their first token before it ever matters, and a timer for each
would cost them more than the rest of this module.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from gpumesh.gateway.http.responses import HeaderPairs
from gpumesh.gateway.http.streaming_response import StreamingResponse

CHECK_S = 1.0  # the longest time between two looks at all streams
CHECKS_PER_INTERVAL = 4  # a short interval is checked more often


class StreamOwner(Protocol):
    """The request, as far as a heartbeat uses it. ``stream`` is ``None`` until its answer has begun."""

    stream: StreamingResponse | None

    def start_stream(self, headers: HeaderPairs) -> StreamingResponse:
        """Begins a streamed answer with the status 200."""


class LifeSign(msgspec.Struct, frozen=True, eq=False):
    """What a heartbeat writes: ``data``, and before it the head of the stream with ``headers`` if it has not begun."""

    data: bytes
    headers: HeaderPairs


class Heartbeat(msgspec.Struct, eq=False):
    """The heartbeat of one request: ``sign`` is written whenever nothing was for ``interval_s`` seconds. If the answer
    has not begun by then, its stream begins: from then on the client can learn of a failure only inside of the stream.

    ``due_at``: when the sign is written next, by the loop's clock; ``None`` before the first check. ``sent_bytes``: how
    many bytes the stream had at the last check. It is a struct because one is made for each streamed request."""

    running: set[Heartbeat]
    owner: StreamOwner
    interval_s: float
    sign: LifeSign
    due_at: float | None = None
    sent_bytes: int = 0

    def __repr__(self) -> str:
        state = "running" if self in self.running else "stopped"
        return f"<Heartbeat every {self.interval_s:g} s {state}>"

    def stop(self) -> None:
        """Writes nothing any more. A second call does nothing."""
        self.running.discard(self)

    def check(self, now: float) -> None:
        """Writes the sign if it is due at ``now`` (seconds of the loop's clock), but not to a backpressured client."""
        stream = self.owner.stream
        if stream is not None and (stream.sent_bytes != self.sent_bytes or stream.backpressured):
            self.sent_bytes = stream.sent_bytes
            self.due_at = now + self.interval_s
        if self.due_at is None:
            self.due_at = now + self.interval_s
        if now < self.due_at:
            return
        try:
            if stream is None:
                stream = self.owner.start_stream(self.sign.headers)
            stream.write(self.sign.data)
        except ConnectionError:  # the client is gone, and its connection cancels the request
            self.stop()
        self.sent_bytes = 0 if stream is None else stream.sent_bytes
        self.due_at = now + self.interval_s


class Heartbeats:
    """The heartbeats of all requests. ``shortest_interval_s``: none of them has a shorter interval. A sign comes up to
    ``CHECK_S`` seconds later than its interval says."""

    def __init__(self, shortest_interval_s: float) -> None:
        self._check_s = min(CHECK_S, shortest_interval_s / CHECKS_PER_INTERVAL)
        self._running: set[Heartbeat] = set()
        self._is_scheduled = False

    def __repr__(self) -> str:
        return f"<Heartbeats {len(self._running)} running>"

    def start(self, owner: StreamOwner, interval_s: float, sign: LifeSign) -> Heartbeat:
        """Starts the heartbeat of a request. The caller must ``stop`` it. Needs a running event loop."""
        heartbeat = Heartbeat(self._running, owner, interval_s, sign)
        self._running.add(heartbeat)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop = asyncio.get_running_loop()
            loop.call_later(self._check_s, self._check, loop)
        return heartbeat

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Checks all heartbeats, and goes on to do so while there are any."""
        now = loop.time()
        for heartbeat in list(self._running):
            heartbeat.check(now)
        self._is_scheduled = bool(self._running)
        if self._is_scheduled:
            loop.call_later(self._check_s, self._check, loop)
