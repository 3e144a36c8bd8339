"""Telling whoever watches that something changed, without queues that grow: a watcher that is slow misses nothing but
the steps in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class ChangeNotifier:
    """``notify`` is cheap and may be called at any rate; a watcher is woken once for all that it has not seen."""

    def __init__(self) -> None:
        self._version = 0
        self._watchers: set[asyncio.Event] = set()

    @property
    def version(self) -> int:
        """Grows with each ``notify``: what was derived from an older version is stale."""
        return self._version

    def notify(self) -> None:
        self._version += 1
        for watcher in self._watchers:
            watcher.set()

    async def watch(self) -> AsyncIterator[None]:
        """Yields at once, and then after each change since the last step."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            while True:
                event.clear()
                yield None
                await event.wait()
        finally:
            self._watchers.discard(event)
