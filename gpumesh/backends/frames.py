"""Lines and server-sent events of a byte stream, however the network cut it up. Bounded: a server that never ends a
line does not fill our memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpumesh.backends.base import Chunk, ServerCounters
from gpumesh.errors import BackendError, GPUMeshError, ProbeError, StreamCut
from gpumesh.lines import LineBuffer, LineTooLong

# The final line of /api/generate holds the whole context as numbers: 2 MB at 262144 tokens. Parsing a line holds up all
# other streams, a tenth of a second for 8 MiB.
LINE_LIMIT = 8 << 20
EVENT_LINES = 1 << 10  # of one server-sent event; an event of an inference server has two or three
MAX_FRAME_END = 4  # bytes of the longest end of a frame
BODY_LIMIT = 64 << 20


class FrameAssembler:
    """Bytes in, whole frames out, not taken apart: the beginning of a frame is held until its end has come.

    ``find_last_end`` says where the last frame ends that ends at or after ``start``; 0 if none does. ``held`` is the
    beginning of a frame.
    """

    __slots__ = ("_find_last_end", "_limit", "held")

    def __init__(self, find_last_end: Callable[[bytearray, int], int], limit: int = LINE_LIMIT) -> None:
        self._find_last_end = find_last_end
        self._limit = limit
        self.held = bytearray()  # a list of its pieces would cost far more memory than they are long

    @property
    def is_too_long(self) -> bool:
        """Whether the frame that has begun is longer than a frame may be."""
        return len(self.held) > self._limit

    def feed(self, data: bytes) -> bytes:
        """All bytes up to the end of the last whole frame."""
        held = self.held
        start = max(len(held) - MAX_FRAME_END, 0)  # what was held without an end need not be searched again
        held += data
        end = self._find_last_end(held, start)
        whole = bytes(held[:end])
        del held[:end]
        return whole

    def take_rest(self) -> bytes:
        """The frame that the body ended in, if it ended in one."""
        rest = bytes(self.held)
        self.held.clear()
        return rest


def find_last_line_end(data: bytearray, start: int) -> int:
    """For a FrameAssembler whose frames are lines."""
    return data.rfind(b"\n", start) + 1


def find_last_event_end(data: bytearray, start: int) -> int:
    """For a FrameAssembler whose frames are server-sent events: each ends with an empty line."""
    plain, after_cr = data.rfind(b"\n\n", start), data.rfind(b"\n\r\n", start)
    return max(plain + 2 if plain >= 0 else 0, after_cr + 3 if after_cr >= 0 else 0)


class LineSplitter:
    """Bytes in, whole lines out, without their ends (LF or CRLF)."""

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        self._lines = LineBuffer(limit)

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ProbeError for a line past the bound."""
        try:
            lines = self._lines.feed(data)
        except LineTooLong:
            raise wrong_dialect_error(f"a line of more than {self._limit >> 20} MiB") from None
        return [line.removesuffix(b"\r") for line in lines]

    def take_rest(self) -> bytes:
        """The line that the body ended in, if it ended in one."""
        return self._lines.take_partial().removesuffix(b"\r")


class EventSplitter:
    """Bytes in, the data of server-sent events out (WHATWG HTML, section 9.2). Their names are not needed here."""

    def __init__(self) -> None:
        self._lines = LineSplitter()
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        return self._read_events(self._lines.feed(data))

    def take_rest(self) -> list[bytes]:
        """At the end of the body, which may lack the last blank line."""
        return self._read_events([self._lines.take_rest(), b""])

    def _read_events(self, lines: Sequence[bytes]) -> list[bytes]:
        events: list[bytes] = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data, self._size = [], 0
                continue
            data = read_event_line(line)
            if data is not None:
                self._data.append(data)
                self._size += len(data)
                if self._size > LINE_LIMIT or len(self._data) > EVENT_LINES:
                    raise wrong_dialect_error(f"an event of more than {LINE_LIMIT >> 20} MiB, or {EVENT_LINES} lines")
        return events


def read_event_line(line: bytes) -> bytes | None:
    """What a line adds to the data of its server-sent event; ``None`` for a comment or a field without data.

    An ``error:`` line, as older llama-servers write it in mid-stream, holds the bare error. Its data has the form that
    all other servers write: ``{"error":…}``.
    """
    field, _, value = line.partition(b":")
    if field not in (b"data", b"error"):
        return None
    value = value.removeprefix(b" ")
    return value if field == b"data" else b'{"error":' + value + b"}"


class BaseFrameReader:
    """What the readers of all dialects share: chunks that came before an error are returned before it is raised."""

    def __init__(self) -> None:
        self.done = False
        self._error: GPUMeshError | None = None

    def feed(self, data: bytes) -> Sequence[Chunk]:
        """Raises BackendError for an error frame and ProbeError for what is no frame of this dialect."""
        if self._error is not None:
            raise self._error
        chunks: list[Chunk] = []
        try:
            self._take(data, chunks)
        except (BackendError, ProbeError) as error:
            if not chunks:
                raise
            self._error = error
        return chunks

    def close(self) -> Sequence[Chunk]:
        """Raises StreamCut when the final frame never came."""
        if self._error is not None:
            raise self._error
        chunks: list[Chunk] = []
        if not self.done:
            self._end(chunks)
        if not self.done:
            raise StreamCut("the answer ended before its final frame")
        return chunks

    def _take(self, data: bytes, chunks: list[Chunk]) -> None:
        raise NotImplementedError

    def _end(self, chunks: list[Chunk]) -> None:
        raise NotImplementedError


def final_chunk(text: str = "", thinking: str = "", *, reason: str | None, counters: ServerCounters | None) -> Chunk:
    return Chunk(text, thinking, done=True, done_reason=reason, counters=counters)


def wrong_dialect_error(what: str) -> ProbeError:
    return ProbeError(f"the answer is not of this kind of server: {what}", finding_code="wrong-server")
