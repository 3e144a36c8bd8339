"""Sinks: the bytes of a body are pushed into a sink as they arrive, with back-pressure.

``BufferedSink`` holds the bytes for a reader. The other sinks pass them on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gpumesh.event_loop.wakeup import Wakeup

BUFFER_BYTES = 1 << 16  # a ``BufferedSink`` that holds more bytes is back-pressured


class ByteSink(Protocol):
    """Takes bytes. If ``backpressured`` is true after a ``write``, the source pauses. The sink calls ``on_writable``
    each time that it can take bytes again."""

    on_writable: Callable[[], None] | None

    @property
    def backpressured(self) -> bool:
        """Whether the source should pause. The sink still takes bytes that the source cannot hold back."""

    def write(self, data: bytes) -> None:
        """Takes these bytes. Raises ConnectionError if nobody reads from the sink any more."""


class BodySink(ByteSink, Protocol):
    """Takes a body and its end. The source calls ``finish`` or ``fail`` once, after the last ``write``.

    ``inspects_frames``: the sink parses each frame, which may cost more than to copy the bytes. So the source writes
    the bytes of one read in small slices, and other connections have their turn between two slices.
    """

    inspects_frames: bool

    def finish(self) -> None:
        """Notes that the body is complete."""

    def fail(self, problem: str) -> None:
        """Notes that the body has ended before it was complete. ``problem`` is the reason."""


class BufferedSink:
    """Holds the bytes of a body for a reader, in one piece of memory, even if they came in many small pieces.

    ``ended``: no more bytes will come. ``problem``: why the body ended before it was complete; ``None`` if it did not.
    The other methods: see ``BodySink``.
    """

    __slots__ = ("_buffer", "_changed", "backpressured", "ended", "on_writable", "problem")

    inspects_frames = False

    def __init__(self, changed: Wakeup | None = None) -> None:
        """Each ``write``, ``finish`` and ``fail`` wakes ``changed``. The reader may share it with other sources of
        changes."""
        self.on_writable: Callable[[], None] | None = None
        self.backpressured = False
        self.ended = False
        self.problem: str | None = None
        self._buffer = bytearray()
        self._changed = changed  # if it is ``None``, it is made when the reader waits: most bodies come at once

    def __repr__(self) -> str:
        end = ""
        if self.ended:
            end = " complete" if self.problem is None else f" failed: {self.problem}"
        return f"<BufferedSink {len(self._buffer)} bytes{end}>"

    def __len__(self) -> int:
        return len(self._buffer)

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.backpressured = len(self._buffer) > BUFFER_BYTES
        if self._changed is not None:
            self._changed.wake()

    def finish(self) -> None:
        self.ended = True
        if self._changed is not None:
            self._changed.wake()

    def fail(self, problem: str) -> None:
        self.ended = True
        self.problem = problem
        if self._changed is not None:
            self._changed.wake()

    def take(self, limit: int | None = None) -> bytes:
        """Removes and returns all held bytes, or at most the first ``limit`` bytes."""
        data = bytes(self._buffer) if limit is None else bytes(self._buffer[:limit])
        del self._buffer[: len(data)]
        if self.backpressured and len(self._buffer) <= BUFFER_BYTES:
            self.backpressured = False
            if self.on_writable is not None:
                self.on_writable()
        return data

    def discard(self) -> None:
        """Drops the held bytes."""
        self._buffer.clear()

    async def wait_changed(self) -> None:
        """Returns after the next ``write``, or after the end of the body."""
        if self._changed is None:
            self._changed = Wakeup()
        await self._changed.wait()
