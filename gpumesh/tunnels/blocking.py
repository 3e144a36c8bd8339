"""Runs blocking calls from asyncio, each in a thread of its own; and ``Deadline``, a time limit that can pause.

Only this file, forwarder.py and loop_thread.py make threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ThreadEvent = threading.Event
"""An event for which a thread waits and that another thread sets (inprocess/heartbeat.py)."""

ThreadLock = threading.Lock
"""A lock for state that two threads share (inprocess/channel_relay.py)."""


class Deadline:
    """The end of a time limit, by ``clock`` (monotonic seconds). ``paused`` moves the end while a person is asked a
    question. ``timeout_s`` is the limit without these moves."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._ends_at = clock() + timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, never negative. Inside ``paused`` this includes the rest of ``max_pause_s``."""
        return max(0.0, self._ends_at - self._clock())

    @property
    def expired(self) -> bool:
        return self.remaining_s <= 0.0

    @contextmanager
    def paused(self, max_pause_s: float) -> Iterator[None]:
        """Moves the deadline by the time that the block takes, at most by ``max_pause_s``."""
        paused_at = self._clock()
        self._ends_at += max_pause_s  # so that the deadline cannot pass inside the block
        try:
            yield
        finally:
            unused_s = max_pause_s - (self._clock() - paused_at)
            self._ends_at -= max(0.0, unused_s)


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function`` in a new thread and returns its result.

    There is no pool of threads: a call that hangs must never delay another call. When the caller is cancelled
    (``asyncio.timeout``), the thread goes on. It is a daemon thread, and ends when the connection that it waits for
    ends.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        """Gives the result or the error to the awaiting task, in its event loop."""
        if future.done():
            return  # the caller was cancelled
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T allows it

    def call_and_deliver() -> None:
        """Calls the function in the thread, and sends its result or error to the event loop."""
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function(*args, **kwargs)
        except BaseException as caught:  # raised again in the awaiting task
            error = caught
        with suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=call_and_deliver, name=getattr(function, "__name__", "call"), daemon=True).start()
    return await future
