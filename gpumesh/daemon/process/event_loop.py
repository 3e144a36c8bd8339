"""Running an event loop to its end, whenever Ctrl-C comes; and which loop: for whoever runs a mesh uvloop where there
is one, which the gateway's hot path is measured on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, use_uvloop: bool = True) -> T:
    """As ``asyncio.run``. SIGINT cancels ``main`` and then raises KeyboardInterrupt. SIGTERM and SIGHUP, unless they
    are ignored, cancel it and then exit as who died by them, so that nothing that ``main`` began is left by these
    either. ``use_uvloop``: worth the time that uvloop takes to be imported.

    Such a process also holds the bodies of many requests (large_memory.py).

    A SIGINT that comes while the loop is made comes when ``main`` has begun: half a loop cannot be closed.
    """
    if use_uvloop:
        from gpumesh.daemon.process.large_memory import map_large_blocks

        map_large_blocks()
    with _held() as release, asyncio.Runner(loop_factory=_factory() if use_uvloop else None) as runner:
        ended_by: list[int] = []

        async def begun() -> T:
            _cancel_on_signals(ended_by)
            release()
            return await main

        try:
            return runner.run(begun())
        except asyncio.CancelledError:
            if ended_by:
                raise SystemExit(128 + ended_by[0]) from None
            raise


def _cancel_on_signals(came: list[int]) -> None:
    """Of the running loop, for the current task. ``main`` may have better uses for them, and then takes them over."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def handle(number: int) -> None:
        came.append(number)
        task.cancel()

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with suppress(NotImplementedError, RuntimeError):  # Windows; not the main thread
                loop.add_signal_handler(number, handle, number)


@contextmanager
def _held() -> Iterator[Callable[[], None]]:
    """Holds SIGINT back until the end or until what is yielded is called."""
    if not hasattr(signal, "pthread_sigmask"):
        yield lambda: None
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield release
    finally:
        release()


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform: asyncio's own loop does
        return None
    return uvloop.new_event_loop
