"""A client's request, as a handler has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from io import BytesIO
from typing import Protocol, TypeVar
from urllib.parse import unquote

from gpumesh.errors import QueueFull
from gpumesh.gateway.http.body_memory import BodyMemory
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.decompression import Decompressor
from gpumesh.gateway.http.errors import BadRequest, body_too_large
from gpumesh.gateway.http.parser import RequestHead
from gpumesh.gateway.http.request_body import RequestBody
from gpumesh.gateway.http.responses import HeaderPairs, Response, has_no_body, render_head
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.slice_queue import SliceQueue

T = TypeVar("T")

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_ID = 128  # characters of a client's X-Request-Id


class RequestConnection(Protocol):
    """The connection, as far as a request knows it."""

    loop: asyncio.AbstractEventLoop
    bounds: Bounds
    memory: BodyMemory
    slices: SliceQueue
    writer: ClientWriter
    client_address: str | None

    def keeps_alive(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""

    def resume_reading(self) -> None:
        """The handler has taken what waited: more may be read."""

    def register_key(self, key: str | None) -> str | None:
        """A request with this key is accepted; or the reason why it must be refused."""


class Request:
    """``target`` is path and query as they came, ``path`` is decoded. ``received_at``: when the head was complete, in
    seconds of the server's clock. ``cors``: header fields that every answer to the request gets. ``stream``: its
    answer, where that is written in pieces. ``body`` is the connection's to feed; handlers read it with the methods
    here."""

    __slots__ = (
        "_connection",
        "body",
        "cors",
        "headers",
        "id",
        "is_http10",
        "keep_alive",
        "method",
        "path",
        "received_at",
        "stream",
        "target",
    )

    def __init__(self, connection: RequestConnection, head: RequestHead, received_at: float) -> None:
        self._connection = connection
        self.method = head.method
        target = head.target
        if "#" in target or not target.startswith("/"):
            target = _strip_origin(target)
        self.target = target
        path = target.partition("?")[0] if "?" in target else target
        self.path = unquote(path) if "%" in path else path
        self.headers = head.headers
        self.is_http10 = head.is_http10
        self.keep_alive = head.keep_alive
        self.received_at = received_at
        request_id = head.headers.get("x-request-id")
        self.id = None if request_id is None else _safe_id(request_id)
        self.cors: dict[str, str] | None = None
        self.body = RequestBody(connection.memory)
        self.stream: StreamingResponse | None = None

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {self.body!r} {self.stream!r}>"

    @property
    def client_address(self) -> str | None:
        return self._connection.client_address

    @property
    def body_received(self) -> bool:
        return self.body.whole

    @property
    def answer_started(self) -> bool:
        """A part of a streamed answer may have been sent."""
        return self.stream is not None and self.stream.started

    @property
    def unfinished_stream(self) -> StreamingResponse | None:
        """The streamed answer of which a part may have been sent and whose end has not."""
        stream = self.stream
        return stream if stream is not None and stream.started and not stream.finished else None

    @property
    def sent_bytes(self) -> int:
        """Bytes of the body of a streamed answer, with their framing."""
        return 0 if self.stream is None else self.stream.sent_bytes

    def register_key(self, key: str | None) -> None:
        """The client may be served: its key counts its connections from now on. Raises QueueFull when the connections
        with this key are too many."""
        refusal = self._connection.register_key(key)
        if refusal is not None:
            raise QueueFull(refusal, retry_after_s=1.0)

    def end(self) -> None:
        """Its handler has ended: nothing is held or called for it any longer."""
        self.body.release()
        self._connection.writer.on_writable = None

    # -- the body ----------------------------------------------------------------------------------------------------

    async def read_body(self) -> bytes:
        """The whole body, unpacked. Raises BadRequest: too large, too slow, not as its head says; and QueueFull where
        there is no room for it."""
        memory, bounds, body = self._connection.memory, self._connection.bounds, self.body
        limit = min(bounds.max_body_bytes, memory.max_body_bytes)
        encoding = self.headers.get("content-encoding", "")
        if body.whole and not encoding and not body.reservation.refused:  # by far the most common
            data = body.take()
            if len(data) > limit:
                raise body_too_large()
            return data
        length = (self.headers.get("content-length") or "").lstrip("0")  # int() takes no more than 4,300 digits
        if length:
            if len(length) > 18 or int(length) > limit:
                raise body_too_large()
            if not body.reservation.can_reserve(int(length)):
                raise memory.build_full_error()
        decompressor = None
        if encoding and encoding.lower() != "identity":
            decompressor = Decompressor(encoding.lower(), min(bounds.max_unpacked_bytes, limit))
        return await self._join_body(limit, decompressor)

    async def _join_body(self, limit: int, decompressor: Decompressor | None) -> bytes:
        joined, reservation = BytesIO(), self.body.reservation  # BytesIO gives its bytes away without a copy
        async for piece in self._reserved_pieces():
            if decompressor is None:
                joined.write(piece)
            else:
                for plain in await self.run_sliced(decompressor.feed(piece)):
                    if not reservation.reserve(len(plain)):
                        raise self._connection.memory.build_full_error()
                    joined.write(plain)
                reservation.release_bytes(len(piece))
            if joined.tell() > limit:
                raise body_too_large()
        if decompressor is not None:
            decompressor.end()
        return joined.getvalue()

    async def read_body_pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any length; each piece is the caller's only until it asks for the next. Raises
        BadRequest: too slow, not as its head says; and QueueFull where there is no room for a piece."""
        async for piece in self._reserved_pieces():
            yield piece
            self.body.reservation.release_bytes(len(piece))

    async def _reserved_pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Each piece stays reserved."""
        body, bounds, loop = self.body, self._connection.bounds, self._connection.loop
        self._send_continue()
        if not body.whole:
            body.reservation.start_reading(body.wake)
        waited_s, size = 0.0, 0  # how long the client let us wait: the time that a handler takes is not the client's
        while True:
            if body.reservation.refused:
                raise self._connection.memory.build_full_error()
            if body.complete:
                body.reservation.finish_reading()
            if body.buffered:
                piece = body.take()
                self._connection.resume_reading()
                size += len(piece)
                yield piece
            elif body.broken:
                raise BadRequest("the request body is not what its head says")
            elif body.complete:
                return
            else:
                began = loop.time()
                try:
                    async with asyncio.timeout(bounds.body_timeout_s + size / bounds.min_bytes_per_s - waited_s):
                        await body.wait_for_change(loop)
                except TimeoutError:
                    raise BadRequest("the request body came too slowly", status=408) from None
                waited_s += loop.time() - began

    def _send_continue(self) -> None:
        """curl and others ask before they send a large body, and wait a second if nobody answers."""
        expectation = self.headers.get("expect")
        if expectation is None:
            return
        if expectation.lower() != "100-continue":
            raise BadRequest("this expectation cannot be met", status=417)
        if not self.is_http10 and not self.answer_started:
            self._connection.writer.write(CONTINUE)

    async def run_sliced(self, work: Generator[None, None, T]) -> T:
        """The result of long work, which is done one step a turn of the event loop (``SliceQueue``)."""
        return await self._connection.slices.run(work)

    # -- memory for what is made of the body -------------------------------------------------------------------------

    @property
    def try_reserve_memory(self) -> Callable[[int], bool]:
        """Says whether so many bytes more may be held for this request until it ends. The function keeps no reference
        to the request."""
        return self.body.reservation.try_reserve

    def reserve_memory(self, size: int) -> None:
        """Raises QueueFull where there is no room."""
        if not self.try_reserve_memory(size):
            raise self._connection.memory.build_full_error()

    def release_memory(self, size: int) -> None:
        """So many of the reserved bytes are held no longer."""
        self.body.reservation.release_bytes(size)

    # -- the answer --------------------------------------------------------------------------------------------------

    def answer_headers(self, headers: HeaderPairs) -> HeaderPairs:
        """These, and what every answer to this request says."""
        if self.cors is None and self.id is None:
            return headers
        more = dict(self.cors or {})
        if self.id is not None:
            more["X-Request-Id"] = self.id
        replaced = {name.lower() for name in more}
        return (*(pair for pair in headers if pair[0].lower() not in replaced), *more.items())

    def start_stream(self, headers: Iterable[tuple[str, str]], *, status: int = 200) -> StreamingResponse:
        """An answer in pieces; its head goes out with the first of them."""
        # The end of the connection is the end of an answer to HTTP/1.0. And what the head says of the connection stays
        # true, whatever comes after it.
        self.keep_alive = keep_alive = not self.is_http10 and self._connection.keeps_alive(self)
        pairs = self.answer_headers(tuple(headers))
        head = render_head(status, pairs, length=None, keep_alive=keep_alive, is_http10=self.is_http10)
        send_body = not has_no_body(self.method, status)
        chunked = not self.is_http10
        self.stream = StreamingResponse(self._connection.writer, status, head, chunked=chunked, send_body=send_body)
        return self.stream


Handler = Callable[[Request], Awaitable[Response | StreamingResponse]]
"""Answers a request. May raise ConnectionError, which cuts the connection."""


def _strip_origin(target: str) -> str:
    """Of a request's target what is asked of this server: a client asks a proxy with ``http://host/path``, and a
    fragment is the client's own affair."""
    if not target.startswith("/") and "://" in target:
        target = "/" + target.partition("://")[2].partition("/")[2]
    return target.partition("#")[0] if "#" in target else target


def _safe_id(request_id: str) -> str | None:
    """What a client calls its request: a short text that is safe in a header and in a log, or nothing."""
    if not request_id or not request_id.isascii() or not request_id.isprintable():
        return None
    return request_id[:MAX_ID]
