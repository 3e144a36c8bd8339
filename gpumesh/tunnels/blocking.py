"""Blocking calls from asyncio, each under a deadline. Beside forwarder.py the only place with threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ThreadEvent = threading.Event
"""For a thread that waits for what another one hears (heartbeat.py)."""

ThreadLock = threading.Lock
"""For state that the transport's thread and the selector's thread share (channels.py)."""


class Deadline:
    """A moment on ``clock`` (seconds, monotonic) that is put off while a person is being asked something."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends = clock() + timeout_s

    @property
    def remaining_s(self) -> float:
        """Never negative; while it is on hold, counts from now on as if nothing had passed."""
        return max(0.0, self._ends - self._clock())

    @property
    def expired(self) -> bool:
        return self.remaining_s <= 0.0

    @contextmanager
    def paused(self, max_pause_s: float) -> Iterator[None]:
        """The time inside does not count, up to ``max_pause_s``."""
        began = self._clock()
        self._ends += max_pause_s
        try:
            yield
        finally:
            self._ends -= max(0.0, max_pause_s - (self._clock() - began))


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function`` in a thread of its own and returns its result.

    No pool: a call that hangs must never keep another waiting. When the caller is cancelled (``asyncio.timeout``) the
    thread is left behind; it is a daemon, and it ends with the connection that it waits for.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return  # nobody waits any more
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T allows it

    def body() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function(*args, **kwargs)
        except BaseException as caught:  # carried to the awaiting task, which judges it
            error = caught
        with suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=body, name=getattr(function, "__name__", "call"), daemon=True).start()
    return await future
