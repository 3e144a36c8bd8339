"""``BaseEventReader``: the base of the readers of streams of server-sent events, each of which holds a JSON object."""

from __future__ import annotations

from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.base import Chunk
from gpumesh.backends.error_text import find_error_message
from gpumesh.backends.frames import BaseFrameReader, EventSplitter, wrong_dialect_error
from gpumesh.errors import BackendError
from gpumesh.text.printable import printable


class BaseEventReader(BaseFrameReader):
    """Splits the stream into events, and reports errors. ``_read_frame`` reads the object of one event."""

    def __init__(self) -> None:
        super().__init__()
        self._events = EventSplitter()

    def _read_data(self, data: bytes, chunks: list[Chunk]) -> None:
        for event in self._events.feed(data):
            self._read_event(event, chunks)

    def _read_rest(self, chunks: list[Chunk]) -> None:
        for event in self._events.take_rest():  # the blank line after the last event may be missing
            if self._is_whole(event):  # any other event was cut by the end of the stream
                self._read_event(event, chunks)

    def _is_whole(self, event: bytes) -> bool:
        """Whether the end of the stream has not cut this event."""
        return safe_json.parse_object(event) is not None

    def _read_event(self, event: bytes, chunks: list[Chunk]) -> None:
        """Adds the chunk of one event to ``chunks``. Events that are blank or come after the final chunk are skipped.
        Raises BackendError and ProbeError."""
        if self.done or not event.strip():
            return
        frame = safe_json.parse_object(event)
        if frame is None:
            raise wrong_dialect_error(f"{printable(event, 60)!r} is no event")
        error = find_error_message(frame)
        if error is not None:
            raise BackendError(f"the server stopped in mid-answer: {error}")
        self._read_frame(frame, chunks)

    def _read_frame(self, frame: dict[str, Any], chunks: list[Chunk]) -> None:
        """Adds the chunk of an event's object to ``chunks``, if it has one."""
        raise NotImplementedError
