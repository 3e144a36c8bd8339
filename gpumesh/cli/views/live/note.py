"""``Note``: a short text in the last line of the live table, which disappears after a few seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

NOTE_SHOWN_S = 4.0


class Note:
    """A text that disappears ``NOTE_SHOWN_S`` after it was shown. ``on_change`` is called when the text changes, also
    when it disappears."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.text = ""
        self._on_change = on_change
        self._timer: asyncio.TimerHandle | None = None

    def show(self, text: str) -> None:
        """Replaces the text."""
        self.close()
        self.text = text
        self._timer = asyncio.get_running_loop().call_later(NOTE_SHOWN_S, self._clear)
        self._on_change()

    def close(self) -> None:
        """Stops the timer, so that ``on_change`` is not called any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _clear(self) -> None:
        self.text = ""
        self._on_change()
