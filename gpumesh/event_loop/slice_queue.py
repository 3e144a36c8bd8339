"""Runs long work in slices, one slice in each turn of the event loop, so that other connections do not wait for it.

A peer can put thousands of chunks of one byte into one read. Each chunk costs a call of ours, so parsing the read in
one go would hold up every other connection. Such a read is parsed slice by slice. In each turn of the event loop only
one slice of one such read is parsed, first come, first served. So the other connections wait for that one slice at
most, however many reads are being parsed. Other long work (unpacking a body, scanning its JSON) takes its turns from
the same queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

SLICE_BYTES = 8 << 10  # bytes of one read that are parsed before other connections have their turn
FRAME_SLICE_BYTES = 4 << 10  # bytes of a stream's frames that are inspected before other connections have their turn
MAX_SMALL_PIECES = 128  # a slice with more pieces than this ends the connection's turn


class SliceQueue:
    """Runs steps in the order in which they were added, one step in each turn of the event loop."""

    def __init__(self) -> None:
        self._steps: deque[Callable[[], None]] = deque()

    def __repr__(self) -> str:
        return f"<SliceQueue {len(self._steps)} queued>"

    def add(self, step: Callable[[], None]) -> None:
        """Schedules ``step`` for a later turn of the running event loop."""
        self._steps.append(step)
        if len(self._steps) == 1:  # with more steps, a call is scheduled already
            asyncio.get_running_loop().call_soon(self._run_next)

    async def wait_turn(self) -> None:
        """Returns in a later turn of the event loop, when all steps that were added before this call have run."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def begin_turn() -> None:
            if not turn.done():  # the future is done already if the waiting task was cancelled
                turn.set_result(None)

        self.add(begin_turn)
        await turn

    async def run(self, work: Generator[None, None, T]) -> T:
        """Runs the generator ``work`` step by step, and returns its result, or raises its error. A step ends with a
        ``yield``. The steps of other work run between two steps of this work."""
        while True:
            await self.wait_turn()
            try:
                next(work)
            except StopIteration as stop:
                result: T = stop.value
                return result

    def _run_next(self) -> None:
        """Runs the first step, removes it, and schedules the next call if steps remain."""
        # The step stays in the queue while it runs, so that ``add`` does not schedule a second call.
        step = self._steps[0]
        try:
            step()  # the step may add itself again, at the end of the queue
        finally:
            self._steps.popleft()
            if self._steps:
                asyncio.get_running_loop().call_soon(self._run_next)
