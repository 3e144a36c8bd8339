"""Notices that the current asyncio task was cancelled although other code has swallowed its CancelledError."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raises CancelledError if the current task was cancelled but still runs.

    Up to Python 3.12, a TaskGroup that ends with an error of its own swallows a cancellation that comes at the same
    time. Libraries that retry an interrupted call swallow a cancellation too.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
