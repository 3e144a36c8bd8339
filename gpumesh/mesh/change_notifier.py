"""Tells watchers that something has changed, without queues that grow: a slow watcher misses only states in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class ChangeNotifier:
    """Wakes its watchers after a change. A watcher is woken once for all changes since its last iteration. ``notify``
    is cheap and may be called at any rate."""

    def __init__(self) -> None:
        self._version = 0
        self._watchers: set[asyncio.Event] = set()
        self._has_waiting = False  # whether a watcher may not know yet that something has changed

    def __repr__(self) -> str:
        return f"<ChangeNotifier version {self._version}, {len(self._watchers)} watchers>"

    @property
    def version(self) -> int:
        """A number that grows with each ``notify``. A value that was computed at an older version is stale."""
        return self._version

    def notify(self) -> None:
        self._version += 1
        if self._has_waiting:
            self._has_waiting = False
            for watcher in self._watchers:
                watcher.set()

    async def watch(self) -> AsyncIterator[None]:
        """Yields at once, and then when something has changed since the last iteration."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            while True:
                event.clear()  # before the yield: a change while the watcher works must not be lost
                self._has_waiting = True
                yield None
                await event.wait()
        finally:
            self._watchers.discard(event)
