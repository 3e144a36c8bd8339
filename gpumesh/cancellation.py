"""A cancellation that others lose: looked for where it must not be."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raises CancelledError if this task was asked to end and is still here.

    Up to Python 3.12 a TaskGroup that ends by an error of its own keeps a cancellation that came meanwhile to itself,
    and so do libraries that retry what was interrupted.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
