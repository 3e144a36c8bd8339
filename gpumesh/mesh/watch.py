"""Watches a generating stream as it passes, without taking it apart: how many frames, whether the final one came, and
the counters in it. A stream that ends without its final frame was cut (facts/ollama-api.md, "Silent endings")."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.backends.base import Counters
from gpumesh.backends.dialects import counters_of


@dataclass(frozen=True, slots=True)
class _Ending:
    """``marks``: any of them in a frame makes it the final one. ``frame``: what ends a frame."""

    marks: tuple[bytes, ...]
    frame: bytes


_NATIVE = _Ending((b'"done":true', b'"done": true'), b"\n")
_ENDINGS = {
    "/api/chat": _NATIVE,
    "/api/generate": _NATIVE,
    "/v1/chat/completions": _Ending((b"data: [DONE]",), b"\n\n"),
    "/v1/completions": _Ending((b"data: [DONE]",), b"\n\n"),
    "/v1/responses": _Ending((b'"type":"response.completed"', b'"type": "response.completed"'), b"\n\n"),
    "/v1/messages": _Ending((b'"type":"message_stop"', b'"type": "message_stop"'), b"\n\n"),
}
_TAIL = 1 << 20  # the final frame of /api/generate carries the whole context


def generates(path: str) -> bool:
    """Whether this route generates text, so that its stream has a final frame."""
    return path in _ENDINGS


class StreamWatch:
    def __init__(self, path: str) -> None:
        self._ending = _ENDINGS.get(path)
        self._tail = b""
        self.done = self._ending is None
        self.counters: Counters | None = None

    def feed(self, data: bytes) -> int:
        """Returns how many frames ended in ``data``: about so many tokens."""
        ending = self._ending
        if ending is None:
            return 0
        frames = data.count(ending.frame)
        whole = frames == 1 and not self._tail and data.endswith(ending.frame)
        if whole and not any(mark in data for mark in ending.marks):
            # By far the most common: one whole frame, which is not the last.
            self._look_for_counters(data)
            return 1
        text = self._tail + data
        head, _, self._tail = text.rpartition(ending.frame)
        if len(self._tail) > _TAIL:
            self._tail = self._tail[-64:]
        for frame in head.split(ending.frame) if head else ():
            self._look_for_counters(frame)
            if any(mark in frame for mark in ending.marks):
                self.done = True
        return frames

    def close(self) -> None:
        """At the end of the body: a last frame may lack its end mark."""
        if self._tail and self._ending is not None:
            self.feed(self._ending.frame)

    def _look_for_counters(self, frame: bytes) -> None:
        if b'"eval_duration"' in frame or b'"timings"' in frame or b'"usage":{' in frame:
            self.counters = counters_of(frame) or self.counters


def error_frame(data: bytes) -> bool:
    """Whether an answer begins with an error under status 200, as Ollama's mid-stream failures do."""
    start = data[:32].lstrip()
    return start.startswith((b'{"error"', b'data: {"error"', b"error:", b"event: error"))
