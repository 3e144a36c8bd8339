"""The sinks that the bytes of a body are pushed into as they arrive, with back-pressure. One of them holds the bytes
for a reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gpumesh.wakeup import Wakeup

BUFFER_BYTES = 1 << 16  # with more bytes for its reader, a sink is back-pressured


class ByteSink(Protocol):
    """Takes bytes. If ``backpressured`` is true after a ``write``, the source pauses. The sink calls ``on_writable``
    each time that it can take bytes again."""

    on_writable: Callable[[], None] | None

    @property
    def backpressured(self) -> bool:
        """Whether the source should pause. The sink still takes bytes that the source cannot hold back."""

    def write(self, data: bytes) -> None:
        """Takes these bytes. Raises ConnectionError if their reader is gone."""


class BodySink(ByteSink, Protocol):
    """Takes a body and its end. The end is one call of ``finish`` or of ``fail``, after the last ``write``.

    ``inspects_frames``: the sink parses each frame, which may cost more than to copy the bytes. So the bytes of one
    read come in small slices, and other connections have their turn between two slices.
    """

    inspects_frames: bool

    def finish(self) -> None:
        """The body is complete."""

    def fail(self, problem: str) -> None:
        """The body has ended before it was complete. ``problem`` is the reason."""


class BufferedSink:
    """Holds a body for a reader. All of it is in one piece of memory, even if it came in many small pieces.

    ``ended``: no more bytes will come. ``problem`` is the reason if the body is not complete.
    """

    __slots__ = ("_buffer", "_changed", "backpressured", "ended", "on_writable", "problem")

    inspects_frames = False

    def __init__(self, changed: Wakeup | None = None) -> None:
        """Each ``write``, ``finish`` and ``fail`` wakes ``changed``. A reader may use it for other changes as well."""
        self.on_writable: Callable[[], None] | None = None
        self.backpressured = False
        self.ended = False
        self.problem: str | None = None
        self._buffer = bytearray()
        self._changed = Wakeup() if changed is None else changed

    def __repr__(self) -> str:
        end = "" if not self.ended else " complete" if self.problem is None else f" failed: {self.problem}"
        return f"<BufferedSink {len(self._buffer)} bytes{end}>"

    def __len__(self) -> int:
        return len(self._buffer)

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.backpressured = len(self._buffer) > BUFFER_BYTES
        self._changed.wake()

    def finish(self) -> None:
        self.ended = True
        self._changed.wake()

    def fail(self, problem: str) -> None:
        self.ended = True
        self.problem = problem
        self._changed.wake()

    def take(self, limit: int | None = None) -> bytes:
        """Removes and returns all held bytes, or the first ``limit`` of them."""
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
        """Returns when something was written, or when the body ended."""
        await self._changed.wait()
