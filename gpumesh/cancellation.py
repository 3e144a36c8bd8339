"""Notices a cancellation that other code has swallowed."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raises CancelledError if this task was cancelled but still runs.

    Up to Python 3.12 a TaskGroup that ends with an error of its own swallows a cancellation that comes meanwhile.
    Libraries that retry an interrupted call swallow it too.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
