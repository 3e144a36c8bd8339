"""``SilenceLimit``: how long llama-server may show no sign of life while it starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class SilenceLimit:
    """A line of its log is a sign of life. So is a weight that reaches a worker (``note_life``): between the beginning
    and the end of a load, llama-server writes nothing in some builds, and over a slow line that takes hours."""

    def __init__(self) -> None:
        self._limit_s: float | None = None
        self._timeout: asyncio.Timeout | None = None

    def __repr__(self) -> str:
        return f"<SilenceLimit {self._limit_s} s>"

    async def read_line(self, lines: AsyncIterator[str], limit_s: float | None) -> str | None:
        """The next of ``lines``; ``None`` after the last. ``limit_s=None``: no limit. Raises TimeoutError."""
        self._limit_s = limit_s
        try:
            async with asyncio.timeout(limit_s) as self._timeout:
                return await anext(lines, None)
        finally:
            self._timeout = None

    def note_life(self) -> None:
        """The time begins anew."""
        if self._timeout is not None and self._limit_s is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._limit_s)
