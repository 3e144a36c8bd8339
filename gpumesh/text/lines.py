"""Splits a byte stream that comes in pieces (a pipe, a socket, a body) into lines of limited length. Pure.

The end of a line is LF. A caller whose lines end in CRLF removes the CR.
"""

from __future__ import annotations


class LineTooLong(ValueError):
    """A line has more bytes than the limit."""


class LineBuffer:
    """Takes pieces of a stream and returns the lines that they complete.

    ``limit_bytes`` is the limit for one line. A longer line raises ``LineTooLong``. With ``cut``, a longer line is
    shortened to the limit instead: this is for text that is only shown. Without a limit, a line without end would fill
    the memory, so the stream must come from a process of ours.
    """

    def __init__(self, limit_bytes: int | None = None, *, cut: bool = False) -> None:
        self._limit_bytes = limit_bytes
        self._cut_long_lines = cut
        self._partial = bytearray()  # a list of pieces would need far more memory than their bytes

    def __repr__(self) -> str:
        return f"<LineBuffer {len(self._partial)} bytes of a partial line>"

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes of the stream. Returns the lines that these bytes complete, without the LF. Raises
        ``LineTooLong``, unless ``cut`` is set."""
        *lines, partial = data.split(b"\n")
        if lines and self._partial:  # the first line has begun in an earlier piece
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
        self._partial += partial
        if self._limit_bytes is not None:
            lines = self._apply_limit(lines, self._limit_bytes)
        return lines

    def take_partial(self) -> bytes:
        """Returns and removes the line that has no end yet. At the end of a stream, that is its last line."""
        line = bytes(self._partial)
        self._partial.clear()
        return line

    def _apply_limit(self, lines: list[bytes], limit: int) -> list[bytes]:
        """Returns ``lines`` as they are if no line, the partial line included, is longer than the limit. Otherwise cuts
        the long lines, or raises ``LineTooLong`` if long lines may not be cut."""
        if len(self._partial) <= limit and all(len(line) <= limit for line in lines):
            return lines
        if not self._cut_long_lines:
            raise LineTooLong(f"a line of more than {limit} bytes")
        del self._partial[limit:]
        return [line[:limit] for line in lines]
