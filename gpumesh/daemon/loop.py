"""Running an event loop to its end, whenever Ctrl-C comes; and which loop: for whoever runs a mesh uvloop where there
is one, which the gateway's hot path is measured on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, fast: bool = True) -> T:
    """As ``asyncio.run``. SIGINT cancels ``main`` and then raises KeyboardInterrupt. ``fast``: worth the time that
    uvloop takes to be imported.

    A SIGINT that comes while the loop is made comes when ``main`` has begun: half a loop cannot be closed.
    """
    with _held() as release, asyncio.Runner(loop_factory=_factory() if fast else None) as runner:

        async def begun() -> T:
            release()
            return await main

        return runner.run(begun())


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
