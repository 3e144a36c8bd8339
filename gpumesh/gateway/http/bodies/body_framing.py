"""Finds the end of a request's body when the head offers another protocol (``Connection: Upgrade``).

llhttp does this for every other body. But llhttp stops after a head with such an offer, because the bytes that follow
an accepted offer are no HTTP. The gateway accepts no offer, so a body may follow, and the decoders here read it: by its
length, or in chunks (RFC 9112 section 7.1). The decoders are pure, and at least as strict as llhttp:
``tests/gateway/http/test_body_framing.py`` compares both.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Protocol

from gpumesh.gateway.http.responses import Headers

_SIZE_LINE = re.compile(rb"([0-9a-fA-F]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")  # the chunk's extension is ignored
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")


class MalformedBody(Exception):
    """The bytes of a body do not follow the framing that its head announces."""


class BodyDecoder(Protocol):
    """Separates a body from the bytes that follow it."""

    @property
    def complete(self) -> bool:
        """Whether the whole body has been fed."""

    def feed(self, data: bytes, pieces: list[bytes]) -> bytes:
        """Appends the body's bytes in ``data`` to ``pieces``. Returns the bytes that follow the body. Raises
        MalformedBody."""


def create_body_decoder(headers: Headers) -> BodyDecoder | None:
    """Makes the decoder for the body that these headers announce; ``None`` if they announce no body. llhttp has checked
    the headers: there is at most one Content-Length, and it is a number."""
    if "transfer-encoding" in headers:
        return ChunkedDecoder()
    length = (headers.get("content-length") or "").lstrip("0")  # leading zeros: int() takes no more than 4,300 digits
    return CountedDecoder(int(length)) if length else None


class CountedDecoder:
    """Reads a body of ``length`` bytes. The methods are described in ``BodyDecoder``."""

    def __init__(self, length: int) -> None:
        self._missing_bytes = length

    @property
    def complete(self) -> bool:
        return self._missing_bytes == 0

    def feed(self, data: bytes, pieces: list[bytes]) -> bytes:
        piece = data[: self._missing_bytes]
        pieces.append(piece)
        self._missing_bytes -= len(piece)
        return data[len(piece) :]


class _Expected(Enum):
    """The element of a chunked body that comes next."""

    SIZE_LINE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILER_LINE = auto()
    NOTHING = auto()


class ChunkedDecoder:
    """Reads a body in chunks. The trailers after it are checked and dropped. The caller limits the length of a line.
    The methods are described in ``BodyDecoder``."""

    def __init__(self) -> None:
        self._expected = _Expected.SIZE_LINE
        self._missing_bytes = 0  # bytes of the chunk that have not come yet
        self._line_start = b""  # the beginning of a line whose end has not come yet

    @property
    def complete(self) -> bool:
        return self._expected is _Expected.NOTHING

    def feed(self, data: bytes, pieces: list[bytes]) -> bytes:
        position = 0
        while position < len(data) and self._expected is not _Expected.NOTHING:
            if self._expected is _Expected.CHUNK:
                piece = data[position : position + self._missing_bytes]
                pieces.append(piece)
                position += len(piece)
                self._missing_bytes -= len(piece)
                if not self._missing_bytes:
                    self._expected = _Expected.CHUNK_END
            else:
                position = self._feed_line(data, position)
                if self._expected is _Expected.SIZE_LINE:
                    position = _take_whole_chunks(data, position, pieces)
        return data[position:]

    def _feed_line(self, data: bytes, position: int) -> int:
        """Takes the line that starts at the index ``position``, or as much of it as has come. Returns the index after
        it."""
        end = data.find(b"\n", position) + 1
        line = self._line_start + data[position : end or len(data)]
        # After a chunk, only a line end may come; a part of it may be missing yet.
        if self._expected is _Expected.CHUNK_END and not b"\r\n".startswith(line):
            raise MalformedBody
        if not end:  # no line end was found
            self._line_start = line
            return len(data)
        self._line_start = b""
        self._take_line(line)
        return end

    def _take_line(self, line: bytes) -> None:
        """Checks the complete line, and decides which element comes next. Raises MalformedBody."""
        if self._expected is _Expected.CHUNK_END:
            self._expected = _Expected.SIZE_LINE
        elif self._expected is _Expected.SIZE_LINE:
            match = _SIZE_LINE.fullmatch(line)
            if match is None:
                raise MalformedBody
            self._missing_bytes = int(match[1], 16)
            self._expected = _Expected.CHUNK if self._missing_bytes else _Expected.TRAILER_LINE
        elif line == b"\r\n":
            self._expected = _Expected.NOTHING
        elif _TRAILER_LINE.fullmatch(line) is None:
            raise MalformedBody


def _take_whole_chunks(data: bytes, position: int, pieces: list[bytes]) -> int:
    """Appends the complete chunks from the index ``position`` on. Returns the index after them. This is a fast path: a
    client may send thousands of chunks of one byte each."""
    while match := _SIZE_LINE.match(data, position):
        chunk_start = match.end()
        chunk_end = chunk_start + int(match[1], 16)
        # ``ChunkedDecoder.feed`` handles the last chunk, which is empty, and a chunk that is malformed or not complete.
        if chunk_end == chunk_start or data[chunk_end : chunk_end + 2] != b"\r\n":
            break
        pieces.append(data[chunk_start:chunk_end])
        position = chunk_end + 2
    return position
