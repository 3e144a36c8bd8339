"""``Decompressor`` unpacks a compressed body (gzip, deflate) piece by piece as it comes, with limits. Pure.

A compressed body may become a thousand times as large when it is unpacked (a "zip bomb"). So there are two limits:

- The unpacked body may be as large as the compressed bodies that Ollama takes (``Bounds.max_unpacked_bytes``). That is
  about a tenth of the limit of a plain body: clients compress text, not images.
- Beyond ``UNCHECKED_BYTES`` the unpacked bytes may be at most ``MAX_RATIO`` times the packed bytes. Repetitive text
  shrinks to a twentieth and images in base64 to three quarters. Only data made for an attack shrinks to less than a
  hundredth.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator

from gpumesh.gateway.http.errors import BadRequest, body_too_large

STEP_BYTES = 256 << 10  # unpacked in one step, in under a millisecond: other clients' tokens wait meanwhile
MAX_RATIO = 100  # unpacked bytes per packed byte, beyond UNCHECKED_BYTES
DEFLATE_METHOD = 8  # in the lower four bits of zlib's header
UNCHECKED_BYTES = 4 << 20  # unpacked bytes to which MAX_RATIO does not apply


class Decompressor:
    """Unpacks one body of at most ``limit`` bytes. Raises BadRequest for an encoding that it does not know."""

    def __init__(self, encoding: str, limit: int) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise BadRequest("the body's Content-Encoding is none of gzip, deflate", status=415)
        self._deflate = encoding == "deflate"
        self._limit = limit
        self._first_bytes = b""  # kept until there are two bytes, which show the format
        self._unpacker: zlib._Decompress | None = None  # made from the first bytes
        self._packed_size = 0
        self._unpacked_size = 0

    def feed(self, data: bytes) -> Generator[None, None, list[bytes]]:
        """Unpacks ``data``, and returns the unpacked pieces. This is a generator for ``SliceQueue.run``, which runs one
        step at a time. Raises BadRequest."""
        if self._unpacker is None:
            data = self._first_bytes + data
            if len(data) < 2:  # the format does not show yet
                self._first_bytes = data
                return []
            self._unpacker = self._create_unpacker(data)
        unpacker = self._unpacker
        unpacked: list[bytes] = []
        # zlib copies its unconsumed input in each step, so it gets only a part of the data at a time.
        for start in range(0, len(data), STEP_BYTES):
            packed = data[start : start + STEP_BYTES]
            self._packed_size += len(packed)
            has_more = True
            while has_more:
                try:
                    piece = unpacker.decompress(packed, STEP_BYTES)
                except zlib.error:
                    raise _malformed_body() from None
                self._count_unpacked(piece)
                unpacked.append(piece)
                packed = unpacker.unconsumed_tail
                # After a piece of the full length, zlib may hold more output, even if it has taken all input.
                has_more = not unpacker.eof and (len(packed) > 0 or len(piece) == STEP_BYTES)
                if has_more or len(data) > STEP_BYTES:
                    yield
            if unpacker.unused_data:  # bytes after the end of the compressed data
                raise _malformed_body()
        return unpacked

    def _count_unpacked(self, piece: bytes) -> None:
        """Raises BadRequest if the body has become too large with this piece."""
        self._unpacked_size += len(piece)
        limit_by_ratio = max(UNCHECKED_BYTES, MAX_RATIO * self._packed_size)
        if self._unpacked_size > min(self._limit, limit_by_ratio):
            raise body_too_large()

    def end(self) -> None:
        """Checks the end of the body: raises BadRequest if the compressed data is incomplete."""
        if self._unpacker is None or not self._unpacker.eof:
            raise _malformed_body()

    def _create_unpacker(self, data: bytes) -> zlib._Decompress:
        """Makes the unpacker for the format that the first two bytes of ``data`` show."""
        # "deflate" means data in zlib's format (RFC 9110 section 8.4.1.2). Some clients send it without zlib's header,
        # whose first byte ends in 8 (the method), and whose two bytes are a multiple of 31 (RFC 1950 section 2.2).
        has_zlib_header = data[0] & 15 == DEFLATE_METHOD and int.from_bytes(data[:2], "big") % 31 == 0
        if self._deflate and not has_zlib_header:
            return zlib.decompressobj(-zlib.MAX_WBITS)  # negative: raw deflate
        # 32: zlib finds out itself whether the header is zlib's or gzip's.
        return zlib.decompressobj(zlib.MAX_WBITS | 32)


def _malformed_body() -> BadRequest:
    """The error for a body that is not valid compressed data."""
    return BadRequest("the request body is not what its head says")
