"""``LongBody`` writes a request's long body to a TLS connection in pieces.

A TLS transport encrypts all that it is given at once: 100 MiB would stop the event loop for more than half a second.
"""

from __future__ import annotations

import asyncio

PIECE_BYTES = 256 << 10  # bytes that are encrypted in one turn of the event loop: 1.5 ms


class LongBody:
    """Writes ``body`` to the transport from ``start`` on, one piece in each turn of the event loop, and waits while the
    transport is full. ``complete``: the transport has all of it."""

    __slots__ = ("_full", "_loop", "_rest", "_scheduled", "_transport")

    def __init__(self, transport: asyncio.Transport, body: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._rest = memoryview(body)
        self._loop = loop
        self._full = False
        self._scheduled = False

    def __repr__(self) -> str:
        return f"<LongBody {len(self._rest)} bytes left{' waiting' if self._full else ''}>"

    @property
    def complete(self) -> bool:
        return not self._rest

    def start(self) -> None:
        """Writes the first piece now."""
        self._write_next()

    def pause(self) -> None:
        """Writes nothing until ``resume``, because the transport is full."""
        self._full = True

    def resume(self) -> None:
        """Writes on, because the transport takes bytes again."""
        self._full = False
        self._schedule()

    def drop(self) -> None:
        """Writes nothing any more, and frees the rest."""
        self._rest = memoryview(b"")

    def _schedule(self) -> None:
        """Schedules the next piece for the next turn, if there is one."""
        if self._rest and not self._full and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._write_next)

    def _write_next(self) -> None:
        self._scheduled = False
        if self._full:
            return
        if self._transport.is_closing():
            self.drop()
            return
        piece, self._rest = self._rest[:PIECE_BYTES], self._rest[PIECE_BYTES:]
        self._transport.write(piece)  # may call ``pause``
        self._schedule()
