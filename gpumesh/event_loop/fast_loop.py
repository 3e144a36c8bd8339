"""The factory of event loops for a process that moves many bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def fast_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's factory of event loops; ``None``, which stands for asyncio's own, where there is no uvloop."""
    try:
        import uvloop
    except ImportError:  # uvloop does not support this platform
        return None
    return uvloop.new_event_loop
