"""``StreamingResponse``: an answer that is written in pieces; in chunks, unless the client speaks HTTP/1.0."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.errors import ClientStalled


class StreamingResponse:
    """A streamed answer. The handler calls ``write`` for each piece. While the stream is ``backpressured``, the handler
    waits, with ``drain`` or until ``on_writable`` is called. ``finish`` completes the answer. An answer that is
    not finished ends with a cut of the connection, so that no client takes a part of the answer for the whole.

    The head goes out with the first piece. ``started``: a part of the answer may have been sent. ``sent_bytes`` counts
    the bytes of the body with its framing. ``send_body``: the answer has a body; the answer to a HEAD has none.
    ``backpressured``: the client reads more slowly than the answer is written; the writer keeps it up to date.
    ``reported_failure``: the handler sets it if the stream tells the client of a failure, whatever the status says.
    """

    __slots__ = (
        "_chunked",
        "_head",
        "_send_body",
        "_transport",
        "_turn_writes",
        "_writer",
        "backpressured",
        "finished",
        "reported_failure",
        "sent_bytes",
        "started",
        "status",
    )

    def __init__(self, writer: ClientWriter, status: int, head: bytes, *, chunked: bool, send_body: bool) -> None:
        self.status = status
        self.started = False
        self.finished = False
        self.reported_failure = False
        self.sent_bytes = 0
        self._writer = writer
        self._transport = writer.transport
        self._turn_writes = writer.turn_writes
        self.backpressured = writer.backpressured
        writer.on_backpressure = self._set_backpressured
        self._head = head
        self._chunked = chunked
        self._send_body = send_body

    def __repr__(self) -> str:
        state = "started" if self.started else "not started"
        if self.finished:
            state = "finished"
        return f"<StreamingResponse {self.status} {state}, {self.sent_bytes} bytes>"

    @property
    def on_writable(self) -> Callable[[], None] | None:
        """The function that is called each time when the stream stops being ``backpressured``, and when the client is
        gone (then ``write`` raises ConnectionResetError). It is forgotten when the handler has ended."""
        return self._writer.on_writable

    @on_writable.setter
    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._writer.on_writable = callback

    def write(self, data: bytes) -> None:
        """Writes a piece of the body, and before the first piece the head. Raises ConnectionError when the client is
        gone."""
        if not self._send_body or not data:
            data = b""
        elif self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.sent_bytes += len(data)
        if not self.started:
            data, self._head = self._head + data, b""
            self.started = True
        # ``ClientWriter.write``, written out here: the call would cost time for each token.
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if data:
            self._turn_writes.write(transport, data)

    def _set_backpressured(self, value: bool) -> None:
        self.backpressured = value

    async def drain(self, slot_is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Waits until the client has taken most of the written bytes. Raises ConnectionError when the client is gone.
        Raises ClientStalled when the client has taken nothing for ``Bounds.stall_timeout_s``, and ``slot_is_wanted``
        says that other requests wait for the slot that this answer holds."""
        writer = self._writer
        timeout_s = writer.bounds.stall_timeout_s
        while writer.backpressured:
            bytes_before = writer.unacknowledged_bytes
            try:
                async with asyncio.timeout(timeout_s):
                    await writer.wait_writable()
            except TimeoutError:
                if bytes_before is None:  # the system does not tell the number: only the writer watches the progress
                    continue
                has_taken_nothing = bytes_before <= (writer.unacknowledged_bytes or 0)
                if has_taken_nothing and slot_is_wanted():
                    raise ClientStalled(timeout_s) from None

    def finish(self) -> None:
        """Completes the answer. Raises ConnectionError when the client is gone."""
        self.finished = True
        if not self.started:
            self.write(b"")
        if self._chunked and self._send_body:
            self._writer.write(b"0\r\n\r\n")
