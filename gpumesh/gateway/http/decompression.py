"""Compressed bodies (gzip, deflate), unpacked piece by piece as they come. Pure.

A compressed body may become a thousand times as large (a "zip bomb"). So it has two bounds. It may become as large as
the compressed bodies that Ollama takes (``Bounds.max_unpacked_bytes``), a tenth of what a plain body may have: a client
that compresses sends text. And past the first ``FREE_BYTES`` it may become ``RATIO`` times as large as what came. Text
that repeats itself shrinks to a twentieth, and images as base64 to three quarters; only data that is made for it
shrinks to less than a hundredth.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator

from gpumesh.gateway.http.errors import BadRequest, body_too_large

PIECE_BYTES = 256 << 10  # unpacked at a time, in under a millisecond: other clients' tokens wait meanwhile
RATIO = 100
FREE_BYTES = 4 << 20


class Decompressor:
    """Unpacks one body of at most ``limit`` bytes. Raises BadRequest for an encoding that it does not know."""

    def __init__(self, encoding: str, limit: int) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise BadRequest("the body's Content-Encoding is none of gzip, deflate", status=415)
        self._deflate = encoding == "deflate"
        self._limit = limit
        self._first_bytes = b""  # until there are two
        self._unpacker: zlib._Decompress | None = None
        self._packed_size = 0
        self._unpacked_size = 0

    def feed(self, data: bytes) -> Generator[None, None, list[bytes]]:
        """What these bytes unpack to. A generator, for ``SliceQueue.run``: each step is one piece of the work. Raises
        BadRequest."""
        if self._unpacker is None:
            data = self._first_bytes + data
            if len(data) < 2:
                self._first_bytes = data
                return []
            self._unpacker = self._create_unpacker(data)
        unpacker, unpacked = self._unpacker, list[bytes]()
        for start in range(0, len(data), PIECE_BYTES):  # zlib copies the rest of its input each time: so little of it
            rest = data[start : start + PIECE_BYTES]
            self._packed_size += len(rest)
            more = True
            while more:
                try:
                    piece = unpacker.decompress(rest, PIECE_BYTES)
                except zlib.error:
                    raise _malformed() from None
                self._count(piece)
                unpacked.append(piece)
                rest = unpacker.unconsumed_tail
                more = not unpacker.eof and (len(rest) > 0 or len(piece) == PIECE_BYTES)
                if more or len(data) > PIECE_BYTES:
                    yield
            if unpacker.unused_data:
                raise _malformed()
        return unpacked

    def _count(self, piece: bytes) -> None:
        self._unpacked_size += len(piece)
        if self._unpacked_size > min(self._limit, max(FREE_BYTES, RATIO * self._packed_size)):
            raise body_too_large()

    def end(self) -> None:
        """All has been fed. Raises BadRequest when it was not whole."""
        if self._unpacker is None or not self._unpacker.eof:
            raise _malformed()

    def _create_unpacker(self, data: bytes) -> zlib._Decompress:
        # "deflate" means data in zlib's format (RFC 9110 section 8.4.1.2). Some clients send it without zlib's header.
        raw = self._deflate and (data[0] & 15 != 8 or int.from_bytes(data[:2], "big") % 31)
        return zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)


def _malformed() -> BadRequest:
    return BadRequest("the request body is not what its head says")
