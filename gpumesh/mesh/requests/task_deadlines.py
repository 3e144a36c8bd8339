"""Deadlines of tasks: as ``asyncio.timeout``, at a tenth of its cost, for code that every request runs through.

``asyncio.timeout`` creates a timer for each use and cancels it again, though nearly no deadline ever passes. Here all
deadlines of a loop share one timer. It runs once in ``CHECK_S``, or sooner if a deadline comes sooner.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

CHECK_S = 1.0  # between two checks of all deadlines, if none of them comes sooner


class TaskDeadlines:
    """Creates the deadlines of one event loop, and cancels the tasks whose deadline has passed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.running: set[TaskDeadline] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.next_check_at = float("inf")

    def __repr__(self) -> str:
        return f"<TaskDeadlines {len(self.running)} running>"

    def schedule_check(self, deadline_at: float) -> None:
        """Schedules the next check, at this time at the latest."""
        if self._timer is not None:
            self._timer.cancel()
        self.next_check_at = check_at = min(deadline_at, self.loop.time() + CHECK_S)
        self._timer = self.loop.call_at(check_at, self._check)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self._timer, self.next_check_at = None, float("inf")
        now = self.loop.time()
        for deadline in [running for running in self.running if running.at <= now]:
            deadline.expire()
        if self.running:
            self.schedule_check(min(deadline.at for deadline in self.running))


class TaskDeadline:
    """A context manager for code of the current task. When the time ``at`` (of the loop's clock) has come, the task is
    cancelled, and the ``with`` block raises TimeoutError, as ``asyncio.timeout`` does."""

    __slots__ = ("_cancels_before", "_deadlines", "_task", "at", "expired")

    def __init__(self, deadlines: TaskDeadlines, timeout_s: float) -> None:
        self.at = deadlines.loop.time() + timeout_s
        self.expired = False
        self._deadlines = deadlines
        self._task: asyncio.Task[object] | None = None
        self._cancels_before = 0

    def __repr__(self) -> str:
        state = "expired" if self.expired else "not running" if self._task is None else "running"
        return f"<TaskDeadline {state}>"

    def __enter__(self) -> TaskDeadline:
        deadlines = self._deadlines
        self._task = task = asyncio.current_task(deadlines.loop)
        assert task is not None, "only a task can have a deadline"
        self._cancels_before = task.cancelling()
        deadlines.running.add(self)
        if self.at < deadlines.next_check_at:
            deadlines.schedule_check(self.at)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._deadlines.running.discard(self)
        if not self.expired or task is None:
            return
        # If somebody else has cancelled the task as well, the cancellation stays one.
        if task.uncancel() <= self._cancels_before and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def expire(self) -> None:
        """Ends the block now. Does nothing outside of the block, or at the second call."""
        if self._task is not None and not self.expired:
            self.expired = True
            self._deadlines.running.discard(self)
            self._task.cancel()
