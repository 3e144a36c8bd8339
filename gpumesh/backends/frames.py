"""Splits a byte stream into lines and server-sent events, wherever the network cuts the stream.

Bounded: a server that never ends a line does not fill our memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpumesh.backends.base import Chunk, ServerCounters
from gpumesh.errors import BackendError, GPUMeshError, ProbeError, StreamCut
from gpumesh.text.lines import LineBuffer, LineTooLong

# The longest line in bytes. The final line of /api/generate holds the whole context as numbers: 2 MB at 262144 tokens.
# While a line is parsed, all other streams wait: a tenth of a second for 8 MiB.
LINE_LIMIT = 8 << 20
EVENT_LIMIT = LINE_LIMIT  # the most bytes of one server-sent event, all its lines together
MAX_EVENT_LINES = 1 << 10  # the most lines of one server-sent event; an inference server sends two or three
MAX_FRAME_END = 4  # no end of a frame has more bytes
BODY_LIMIT = 64 << 20  # the most bytes of an answer in one piece


class FrameAssembler:
    """Cuts a byte stream into whole frames. It returns bytes as soon as their frame is whole, and holds the beginning
    of a frame until its end comes. Several whole frames are returned in one piece.

    ``find_last_end(data, start)`` looks for ends of frames from ``start`` on. It returns the position after the last
    end, or 0 if there is none. ``limit``: the longest frame in bytes. ``held`` is the beginning that is held now.
    """

    __slots__ = ("_find_last_end", "_limit", "held")

    def __init__(self, find_last_end: Callable[[bytearray, int], int], limit: int = LINE_LIMIT) -> None:
        self._find_last_end = find_last_end
        self._limit = limit
        self.held = bytearray()  # a list of small pieces would take far more memory than their bytes

    @property
    def is_too_long(self) -> bool:
        """Whether the held beginning is already longer than a frame may be."""
        return len(self.held) > self._limit

    def feed(self, data: bytes) -> bytes:
        """Adds ``data``, and returns all bytes up to the end of the last whole frame."""
        held = self.held
        # The held bytes were searched before. But the first bytes of an end may be the last held bytes.
        start = max(len(held) - MAX_FRAME_END, 0)
        held += data
        end = self._find_last_end(held, start)
        whole = bytes(held[:end])
        del held[:end]
        return whole

    def take_rest(self) -> bytes:
        """The last frame of the body if its end is missing; empty otherwise."""
        rest = bytes(self.held)
        self.held.clear()
        return rest


def find_last_line_end(data: bytearray, start: int) -> int:
    """``find_last_end`` of a FrameAssembler whose frames are lines."""
    return data.rfind(b"\n", start) + 1


def find_last_event_end(data: bytearray, start: int) -> int:
    """``find_last_end`` of a FrameAssembler whose frames are server-sent events: each ends with an empty line. Both
    line ends, LF and CRLF, may be there."""
    lf_at = data.rfind(b"\n\n", start)
    crlf_at = data.rfind(b"\n\r\n", start)  # the end of CR LF CR LF
    lf_end = lf_at + 2 if lf_at >= 0 else 0
    crlf_end = crlf_at + 3 if crlf_at >= 0 else 0
    return max(lf_end, crlf_end)


class LineSplitter:
    """Splits a byte stream into whole lines, without their line ends (LF or CRLF). ``limit``: the longest line in
    bytes."""

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        self._lines = LineBuffer(limit)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete after these bytes. Raises ProbeError for a line that is longer than the limit."""
        try:
            lines = self._lines.feed(data)
        except LineTooLong:
            raise wrong_dialect_error(f"a line of more than {self._limit >> 20} MiB") from None
        return [line.removesuffix(b"\r") for line in lines]

    def take_rest(self) -> bytes:
        """The last line of the body if its end is missing; empty otherwise."""
        return self._lines.take_partial().removesuffix(b"\r")


class EventSplitter:
    """Splits a byte stream into server-sent events (WHATWG HTML, section 9.2), of which it returns only the data: no
    reader here needs the names of events."""

    def __init__(self) -> None:
        self._lines = LineSplitter()
        self._event_lines: list[bytes] = []
        self._event_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that is complete after these bytes. Raises ProbeError for an event, or a line, that is
        longer than its limit."""
        return self._read_events(self._lines.feed(data))

    def take_rest(self) -> list[bytes]:
        """The last event of the body, whose blank line may be missing."""
        return self._read_events([self._lines.take_rest(), b""])

    def _read_events(self, lines: Sequence[bytes]) -> list[bytes]:
        """The data of each event that ends with one of these lines: an empty line ends an event."""
        events: list[bytes] = []
        for line in lines:
            if line:
                self._add_event_line(line)
            elif self._event_lines:
                events.append(b"\n".join(self._event_lines))
                self._event_lines, self._event_bytes = [], 0
        return events

    def _add_event_line(self, line: bytes) -> None:
        """Adds a line to the event that is being read. Raises ProbeError when the event becomes too long."""
        data = read_event_line(line)
        if data is None:
            return
        self._event_lines.append(data)
        self._event_bytes += len(data)
        if self._event_bytes > EVENT_LIMIT or len(self._event_lines) > MAX_EVENT_LINES:
            limits = f"{EVENT_LIMIT >> 20} MiB, or {MAX_EVENT_LINES} lines"
            raise wrong_dialect_error(f"an event of more than {limits}")


def read_event_line(line: bytes) -> bytes | None:
    """The data that a line adds to its server-sent event; ``None`` for a comment or a field without data.

    Some builds of llama-server write an error in mid-stream as an ``error:`` line, which holds only the error object.
    Such a line is returned in the form that all other servers use: ``{"error":…}``.
    """
    field, _, value = line.partition(b":")
    if field not in (b"data", b"error"):
        return None
    value = value.removeprefix(b" ")
    return value if field == b"data" else b'{"error":' + value + b"}"


class BaseFrameReader:
    """The base of the readers of all dialects. If an error comes after chunks in the same bytes, ``feed`` returns the
    chunks, and the next call raises the error.

    ``done``: the final frame has come."""

    def __init__(self) -> None:
        self.done = False
        self._error: GPUMeshError | None = None

    def feed(self, data: bytes) -> Sequence[Chunk]:
        """The chunks that are complete after these bytes. Raises BackendError for an error frame, and ProbeError for
        bytes that are not a frame of this dialect."""
        if self._error is not None:
            raise self._error
        chunks: list[Chunk] = []
        try:
            self._read_data(data, chunks)
        except (BackendError, ProbeError) as error:
            if not chunks:
                raise
            self._error = error  # raised by the next call
        return chunks

    def close(self) -> Sequence[Chunk]:
        """The last chunks, at the end of the stream. Raises StreamCut when the final frame never came."""
        if self._error is not None:
            raise self._error
        chunks: list[Chunk] = []
        if not self.done:
            self._read_rest(chunks)
        if not self.done:
            raise StreamCut("the answer ended before its final frame")
        return chunks

    def _read_data(self, data: bytes, chunks: list[Chunk]) -> None:
        """Adds the chunks that are complete after these bytes to ``chunks``."""
        raise NotImplementedError

    def _read_rest(self, chunks: list[Chunk]) -> None:
        """Adds the last chunks to ``chunks``: the stream has ended, and its final frame has not been read."""
        raise NotImplementedError


def final_chunk(text: str = "", thinking: str = "", *, reason: str | None, counters: ServerCounters | None) -> Chunk:
    """The chunk that ends an answer. ``reason`` says why the server ended it, such as ``stop`` or ``length``."""
    return Chunk(text, thinking, done=True, done_reason=reason, counters=counters)


def wrong_dialect_error(reason: str) -> ProbeError:
    """The error for an answer that cannot be read by the dialect that this server should have."""
    return ProbeError(f"the answer is not of this kind of server: {reason}", finding_code="wrong-server")
