"""The event loop of whoever runs a mesh: uvloop where there is one, which the gateway's hot path is measured on."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

FILES = 65536


def run(main: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``. SIGINT cancels ``main`` and then raises KeyboardInterrupt."""
    _allow_files()
    with asyncio.Runner(loop_factory=_factory()) as runner:
        return runner.run(main)


def _allow_files() -> None:
    """Each stream through the gateway is two open sockets; 1024 files, the usual bound, would be some 500 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS refuses more than the kernel's own bound
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform: asyncio's own loop does
        return None
    return uvloop.new_event_loop
