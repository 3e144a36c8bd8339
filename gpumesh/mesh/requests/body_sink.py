"""Where the bytes of a body are pushed as they arrive, with back-pressure; and a sink that holds them for a reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

BUFFER_BYTES = 1 << 16  # held for a reader that is slow; past it the sink is back-pressured


class ByteSink(Protocol):
    """Takes bytes. A source that sees ``backpressured`` after a ``write`` pauses. The sink calls ``on_writable`` each
    time that it takes bytes again."""

    on_writable: Callable[[], None] | None

    @property
    def backpressured(self) -> bool:
        """Whether the sink wants no more bytes for now. It still takes what cannot be held back."""

    def write(self, data: bytes) -> None:
        """Raises ConnectionError when nobody will read these bytes."""


class BodySink(ByteSink, Protocol):
    """Takes a body and its end: one call of ``finish`` or of ``fail``, after the last ``write``.

    ``inspects_frames``: the sink looks at each frame, which may cost more than the bytes do. So it gets what was read
    at once in small slices, and other connections have their turn between two of them.
    """

    inspects_frames: bool

    def finish(self) -> None:
        """The body is complete."""

    def fail(self, problem: str) -> None:
        """No more of the body will come, for this reason."""


class Wakeup:
    """Wakes the one task that waits for a change."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Returns after the next ``wake``."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class BufferedSink:
    """Holds a body for a reader, in one piece of memory however small the pieces are that it came in.

    ``ended``: no more will come; ``problem`` says why, unless the body is complete.
    """

    __slots__ = ("_buffer", "_changed", "backpressured", "ended", "on_writable", "problem")

    inspects_frames = False

    def __init__(self, changed: Wakeup | None = None) -> None:
        """``changed`` is woken by each call; a reader may wait for other changes with it as well."""
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
        """What is held, or the first ``limit`` bytes of it."""
        data = bytes(self._buffer) if limit is None else bytes(self._buffer[:limit])
        del self._buffer[: len(data)]
        if self.backpressured and len(self._buffer) <= BUFFER_BYTES:
            self.backpressured = False
            if self.on_writable is not None:
                self.on_writable()
        return data

    def discard(self) -> None:
        """Drops what is held."""
        self._buffer.clear()

    async def wait_changed(self) -> None:
        """Returns when something was written, or when the body ended."""
        await self._changed.wait()
