"""``LongBody`` writes a request's long body to a TLS connection in pieces.

A TLS transport encrypts all that it is given at once: 100 MiB would stop the event loop for more than half a second.
"""

from __future__ import annotations

import asyncio

PIECE_BYTES = 256 << 10  # bytes that are encrypted in one turn of the event loop: 1.5 ms


class LongBody:
    """Writes ``body`` to the transport from ``start`` on, one piece in each turn of the event loop, and waits while the
    transport is full. ``complete``: the transport has all of it."""

    __slots__ = ("_is_transport_full", "_loop", "_rest", "_scheduled", "_transport")

    def __init__(self, transport: asyncio.Transport, body: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._rest = memoryview(body)  # what the transport does not have yet
        self._loop = loop
        self._is_transport_full = False
        self._scheduled = False  # whether ``_write_next`` runs in the next turn

    def __repr__(self) -> str:
        return f"<LongBody {len(self._rest)} bytes left{' waiting' if self._is_transport_full else ''}>"

    @property
    def complete(self) -> bool:
        return not self._rest

    def start(self) -> None:
        """Writes the first piece now."""
        self._write_next()

    def pause(self) -> None:
        """Writes nothing until ``resume``, because the transport is full."""
        self._is_transport_full = True

    def resume(self) -> None:
        """Writes on, because the transport takes bytes again."""
        self._is_transport_full = False
        self._schedule()

    def drop(self) -> None:
        """Writes nothing any more, and frees the rest."""
        self._rest = memoryview(b"")

    def _schedule(self) -> None:
        """Schedules the next piece for the next turn, if there is one."""
        if self._rest and not self._is_transport_full and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._write_next)

    def _write_next(self) -> None:
        """Writes the next piece, and schedules the one after it. Does nothing while the transport is full: ``resume``
        schedules the piece then."""
        self._scheduled = False
        if self._is_transport_full:
            return
        if self._transport.is_closing():
            self.drop()
            return
        piece, self._rest = self._rest[:PIECE_BYTES], self._rest[PIECE_BYTES:]
        self._transport.write(piece)  # may call ``pause``
        self._schedule()
