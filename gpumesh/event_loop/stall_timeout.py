"""``stall_timeout``: a time-out that does not count the time in which this process itself stood still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# A timer that fires so late shows that this process was stopped, or that its event loop was blocked: an answer may have
# come long ago and not have been read yet.
STALL_S = 0.1


@asynccontextmanager
async def stall_timeout(seconds: float) -> AsyncIterator[None]:
    """Raises TimeoutError if the block takes longer. If the process stood still meanwhile, the time begins anew."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def start() -> None:
        nonlocal timer
        timer = loop.call_later(seconds, check, loop.time() + seconds)

    def check(due_at: float) -> None:
        if loop.time() - due_at > STALL_S:
            start()
        else:
            limit.reschedule(loop.time())

    async with asyncio.timeout(None) as limit:
        start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
