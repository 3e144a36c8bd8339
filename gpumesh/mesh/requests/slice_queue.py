"""Bytes that cost more to parse than their number says: whose are parsed next.

A peer can put thousands of chunks of one byte into one read, each of which is a call of ours. Parsed in one go they
hold up every other connection. So such a read is parsed slice by slice, and all connections that have one under way
share one slice in each turn of the event loop: however many they are, the others wait for no more than that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

SLICE_BYTES = 8 << 10  # bytes
FRAME_SLICE_BYTES = 4 << 10  # bytes of a stream's frames that are looked at before others have their turn
MAX_SMALL_PIECES = 128  # in one slice: from so many pieces on, others have their turn before the next


class SliceQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self._steps: deque[Callable[[], None]] = deque()

    def add(self, step: Callable[[], None]) -> None:
        """Has ``step`` called in a later turn of the running event loop."""
        self._steps.append(step)
        if len(self._steps) == 1:
            asyncio.get_running_loop().call_soon(self._run_next)

    async def wait_turn(self) -> None:
        """Returns in a later turn, when those that wait already have had theirs."""
        come: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.add(lambda: None if come.done() else come.set_result(None))
        await come

    def _run_next(self) -> None:
        step = self._steps[0]
        try:
            step()  # may add itself again, at the end
        finally:
            self._steps.popleft()
            if self._steps:
                asyncio.get_running_loop().call_soon(self._run_next)
