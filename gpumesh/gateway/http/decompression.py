"""Compressed bodies, unpacked piece by piece as they come. Pure.

What comes out may be a thousand times as large as what comes in: a client that compresses is believed to send text, so
its body may be as large as Ollama takes a compressed one (``Bounds.unpacked_bytes``), a tenth of what a plain one may
be; and past the first few megabytes it may be RATIO times as large as what came. Text that repeats itself shrinks to a
twentieth, images as base64 to three quarters; only what is made for it gets below a hundredth.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator

from gpumesh.gateway.http.errors import BadRequest

PIECE = 256 << 10  # bytes that are unpacked at a time, under a millisecond: others' tokens wait meanwhile
RATIO = 100
FREE_BYTES = 4 << 20  # that may come of anything


class Decompressor:
    """Raises BadRequest for an encoding that is none of these."""

    def __init__(self, encoding: str, limit: int) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise BadRequest("the body's Content-Encoding is none of gzip, deflate", status=415)
        self._deflate = encoding == "deflate"
        self._limit = limit
        self._begun = b""
        self._unpack: zlib._Decompress | None = None
        self._taken = 0
        self._made = 0

    def feed(self, data: bytes) -> Generator[None, None, list[bytes]]:
        """What comes out for these bytes, in pieces of work. Raises BadRequest."""
        if self._unpack is None:
            data = self._begun + data
            if len(data) < 2:
                self._begun = data
                return []
            self._unpack = self._begin(data)
        out: list[bytes] = []
        for start in range(0, len(data), PIECE):  # what is not taken of a piece is copied each time
            rest = data[start : start + PIECE]
            self._taken += len(rest)
            more = True
            while more:
                try:
                    piece = self._unpack.decompress(rest, PIECE)
                except zlib.error:
                    raise _broken() from None
                self._made += len(piece)
                if self._made > self._limit or self._made > max(FREE_BYTES, RATIO * self._taken):
                    raise BadRequest("the request body is too large", status=413)
                out.append(piece)
                rest = self._unpack.unconsumed_tail
                more = not self._unpack.eof and (len(rest) > 0 or len(piece) == PIECE)
                if more or len(data) > PIECE:
                    yield
            if self._unpack.unused_data:
                raise _broken()
        return out

    def end(self) -> None:
        """Raises BadRequest for what is not whole."""
        if self._unpack is None or not self._unpack.eof:
            raise _broken()

    def _begin(self, data: bytes) -> zlib._Decompress:
        # RFC 9110 section 8.4.1.2: "deflate" has zlib's wrapping, which some clients leave out.
        raw = self._deflate and (data[0] & 15 != 8 or int.from_bytes(data[:2], "big") % 31)
        return zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)


def _broken() -> BadRequest:
    return BadRequest("the request body is not what its head says")
