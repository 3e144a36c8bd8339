"""Joins the pieces of a request's body in short steps: to copy 100 MiB at once would stop the event loop. Pure."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from io import BytesIO

import msgspec

COPY_BYTES = 1 << 20  # bytes that are copied in one step
Piece = bytes | memoryview | msgspec.Raw


def join_pieces(pieces: Iterable[Piece]) -> Generator[None, None, bytes]:
    """Yields whenever about ``COPY_BYTES`` have been copied, and returns the body."""
    body = BytesIO()
    next_yield_at = COPY_BYTES  # bytes of the body
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), COPY_BYTES):
            body.write(view[start : start + COPY_BYTES])
            if body.tell() >= next_yield_at:
                next_yield_at = body.tell() + COPY_BYTES
                yield
    return body.getvalue()  # BytesIO returns its own bytes, without a copy
