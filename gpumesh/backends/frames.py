"""Cutting a body into lines and server-sent events, however the network cut it up. Bounded: a server that never ends
its line does not fill our memory."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.backends.base import Chunk, ServerCounters
from gpumesh.errors import BackendError, GPUMeshError, ProbeError, StreamCut

# The final line of /api/generate holds the whole context as numbers: 2 MB at 262144 tokens. What is larger holds up all
# other streams while it is looked through, a tenth of a second for 8 MiB.
LINE_LIMIT = 8 << 20
EVENT_LINES = 1 << 10  # of one server-sent event; those of the dialects have two or three
BODY_LIMIT = 64 << 20


class LineSplitter:
    """Bytes in, whole lines out, without their ends (LF or CRLF)."""

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        self._begun = bytearray()  # a line; a list of its pieces would cost far more memory than they are long

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ProbeError for a line past the bound."""
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self._begun) + lines[0]
            self._begun.clear()
        self._begun += rest
        if len(self._begun) > self._limit or (lines and len(lines[0]) > self._limit):
            raise wrong_dialect_error(f"a line of more than {self._limit >> 20} MiB")
        return [line.removesuffix(b"\r") for line in lines]

    def take_rest(self) -> bytes:
        """The line that the body ended in, if it ended in one."""
        line = bytes(self._begun)
        self._begun.clear()
        return line.removesuffix(b"\r")


class EventSplitter:
    """Bytes in, the data of server-sent events out (WHATWG HTML, section 9.2); their names are of no use here.

    ``error:`` lines, as older llama-servers write them in mid-stream, hold the bare error: they are given as data of
    the form that all others write, ``{"error":…}``.
    """

    def __init__(self) -> None:
        self._lines = LineSplitter()
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        return self._events(self._lines.feed(data))

    def take_rest(self) -> list[bytes]:
        """At the end of the body, which may lack the last blank line."""
        return self._events([self._lines.take_rest(), b""])

    def _events(self, lines: Sequence[bytes]) -> list[bytes]:
        found: list[bytes] = []
        for line in lines:
            if not line:
                if self._data:
                    found.append(b"\n".join(self._data))
                    self._data, self._size = [], 0
                continue
            field, _, value = line.partition(b":")
            if field in (b"data", b"error"):
                value = value.removeprefix(b" ")
                self._data.append(value if field == b"data" else b'{"error":' + value + b"}")
                self._size += len(value)
                if self._size > LINE_LIMIT or len(self._data) > EVENT_LINES:
                    raise wrong_dialect_error(f"an event of more than {LINE_LIMIT >> 20} MiB, or {EVENT_LINES} lines")
        return found


class BaseFrameReader:
    """What the readers of all dialects share: chunks that came before an error are given before it is raised."""

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
