"""``stall_timeout``: a time-out that does not count the time in which this process itself stood still."""

from __future__ import annotations

import asyncio
from types import TracebackType

# A timer that fires so late shows that this process was stopped, or that its event loop was blocked: an answer may have
# come long ago and not have been read yet.
STALL_S = 0.1


class stall_timeout:  # noqa: N801 - used as ``asyncio.timeout`` is
    """An async context manager that raises TimeoutError if the block takes longer than ``seconds``. If the process
    stood still meanwhile, the time begins anew. A class, because a generator would take several times as long."""

    __slots__ = ("_due_at", "_limit", "_loop", "_seconds", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<stall_timeout {self._seconds:g} s>"

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)

    def _start(self) -> None:
        self._due_at = self._loop.time() + self._seconds
        self._timer = self._loop.call_later(self._seconds, self._check)

    def _check(self) -> None:
        if self._loop.time() - self._due_at > STALL_S:
            self._start()
        else:
            self._limit.reschedule(self._loop.time())
