"""``TurnEnd`` runs callbacks at the end of a turn of the event loop, so that all writes of the turn leave together.

Each write to a socket wakes the process that reads there. On a machine with few cores that process often takes the core
at once, and comes back with cold caches. So a turn first computes all that it will write, and then writes it. This
saves a fifth of the CPU time of a request (``benchmarks/cpu_cost.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class TurnEnd:
    """Calls each added callback once, after everything that is ready to run in the event loop now."""

    __slots__ = ("_callbacks",)

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<TurnEnd {len(self._callbacks)} callbacks>"

    def add(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` at the end of this turn. An error that it raises is logged."""
        if not self._callbacks:
            asyncio.get_running_loop().call_soon(self._run_callbacks)
        self._callbacks.append(callback)

    def _run_callbacks(self) -> None:
        # A new list: a callback that is added from now on belongs to the next turn.
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:  # a bug of ours: the callbacks of other connections are called all the same
                log.exception("a callback at the end of a turn failed", extra={"event": "request-failed"})
