"""``Wakeup``: one asyncio task waits until another part of the program has changed something and wakes it."""

from __future__ import annotations

import asyncio


class Wakeup:
    """Wakes the one task that waits for a change. No second task may wait at the same time."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Returns after the next ``wake``. A ``wake`` before this call does not count."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Lets ``wait`` return. Does nothing when no task waits."""
        if self._waiter is not None and not self._waiter.done():  # done: woken or cancelled, but has not run since
            self._waiter.set_result(None)
