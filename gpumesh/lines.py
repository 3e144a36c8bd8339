"""Lines of a byte stream that comes in pieces. Pure; the length of a line has a limit.

For pipes, sockets and bodies. The end of a line is LF; a caller whose lines end in CRLF removes the CR.
"""

from __future__ import annotations


class LineTooLong(ValueError):
    """A line has more bytes than the limit."""


class LineBuffer:
    """Takes pieces of a stream, returns the lines that they complete.

    ``limit_bytes`` is the limit for one line. A longer line raises ``LineTooLong``, or with ``cut`` is shortened to the
    limit: for text that is only shown. Without a limit, the stream must come from our own process.
    """

    def __init__(self, limit_bytes: int | None = None, *, cut: bool = False) -> None:
        self._limit_bytes = limit_bytes
        self._cut_long_lines = cut
        self._partial = bytearray()  # a list of pieces would need far more memory than their bytes

    def __repr__(self) -> str:
        return f"<LineBuffer {len(self._partial)} bytes of a partial line>"

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that ``data`` completes, without their ends. Raises ``LineTooLong``."""
        *lines, partial = data.split(b"\n")
        if lines and self._partial:
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
        self._partial += partial
        if self._limit_bytes is not None:
            lines = self._apply_limit(lines, self._limit_bytes)
        return lines

    def take_partial(self) -> bytes:
        """The line that has begun and has no end yet; it is removed. At the end of a stream it is the last line."""
        line = bytes(self._partial)
        self._partial.clear()
        return line

    def _apply_limit(self, lines: list[bytes], limit: int) -> list[bytes]:
        if len(self._partial) <= limit and all(len(line) <= limit for line in lines):
            return lines
        if not self._cut_long_lines:
            raise LineTooLong(f"a line of more than {limit} bytes")
        del self._partial[limit:]
        return [line[:limit] for line in lines]
