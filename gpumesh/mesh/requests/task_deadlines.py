"""``TaskDeadline``: as ``asyncio.timeout``, but at a tenth of its cost, for code that every request runs through.

``asyncio.timeout`` creates a timer for each use and cancels it again, though nearly no deadline ever passes. Here all
deadlines of a loop share one timer. The timer runs once in ``CHECK_S``, or sooner if a deadline comes sooner.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import msgspec

CHECK_S = 1.0  # between two checks of all deadlines, if no deadline comes sooner


class TaskDeadlines:
    """Holds the deadlines of one event loop that are running, and ends those that have passed. ``next_check_at``: the
    time of the next check by the loop's clock; infinite if no check is scheduled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.running: set[TaskDeadline] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.next_check_at = float("inf")

    def __repr__(self) -> str:
        return f"<TaskDeadlines {len(self.running)} running>"

    def schedule_check(self, deadline_at: float) -> None:
        """Schedules the next check at the time ``deadline_at``, or in ``CHECK_S`` if that is sooner."""
        if self._timer is not None:
            self._timer.cancel()
        self.next_check_at = check_at = min(deadline_at, self.loop.time() + CHECK_S)
        self._timer = self.loop.call_at(check_at, self._check)

    def close(self) -> None:
        """Stops the checks. The deadlines that are still running never pass."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        """Ends the deadlines that have passed, and schedules the next check if others are running."""
        self._timer, self.next_check_at = None, float("inf")
        now = self.loop.time()
        for deadline in [deadline for deadline in self.running if deadline.at <= now]:
            deadline.expire()
        if self.running:
            self.schedule_check(min(deadline.at for deadline in self.running))


class TaskDeadline(msgspec.Struct, eq=False):
    """Limits the time of a ``with`` block in the current task, as ``asyncio.timeout`` does: after ``timeout_s``
    seconds, at the time ``at`` of the loop's clock, the task is cancelled, and the block raises TimeoutError instead of
    the CancelledError. A struct of msgspec, because each request makes one."""

    deadlines: TaskDeadlines
    timeout_s: float
    at: float = 0.0
    expired: bool = False
    task: asyncio.Task[object] | None = None
    cancels_before: int = 0

    def __repr__(self) -> str:
        state = "not running" if self.task is None else "running"
        if self.expired:
            state = "expired"
        return f"<TaskDeadline {state}>"

    def __enter__(self) -> TaskDeadline:
        """Starts the deadline for the current task."""
        deadlines = self.deadlines
        self.task = task = asyncio.current_task(deadlines.loop)
        assert task is not None, "only a task can have a deadline"
        self.cancels_before = task.cancelling()
        self.at = at = deadlines.loop.time() + self.timeout_s
        deadlines.running.add(self)
        if at < deadlines.next_check_at:
            deadlines.schedule_check(at)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the deadline. If it has passed, raises TimeoutError in place of the CancelledError."""
        task, self.task = self.task, None
        self.deadlines.running.discard(self)
        if not self.expired or task is None:
            return
        # If other code has cancelled the task as well, the CancelledError goes on and does not become a TimeoutError.
        only_we_cancelled = task.uncancel() <= self.cancels_before
        if only_we_cancelled and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def expire(self) -> None:
        """Ends the block now, as if the deadline had passed. Does nothing outside of the block, or at the second
        call."""
        if self.task is not None and not self.expired:
            self.expired = True
            self.deadlines.running.discard(self)
            self.task.cancel()
