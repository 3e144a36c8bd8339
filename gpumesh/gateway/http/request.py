"""``Request``: a client's request as the handler sees it: its head, its body, and the start of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from io import BytesIO
from typing import Protocol, TypeVar
from urllib.parse import unquote

from gpumesh.errors import QueueFull
from gpumesh.event_loop.slice_queue import SliceQueue
from gpumesh.gateway.http.bodies.body_memory import BodyMemory
from gpumesh.gateway.http.bodies.decompression import Decompressor
from gpumesh.gateway.http.bodies.request_body import RequestBody
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.errors import BadRequest, body_too_large
from gpumesh.gateway.http.heartbeat import Heartbeat
from gpumesh.gateway.http.parser import RequestHead
from gpumesh.gateway.http.responses import HeaderPairs, Response, has_no_body, render_head
from gpumesh.gateway.http.streaming_response import StreamingResponse

T = TypeVar("T")

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_LENGTH_DIGITS = 18  # without leading zeros; a longer Content-Length is above any limit
MAX_ID_LENGTH = 128  # characters that are kept of a client's X-Request-Id


class RequestConnection(Protocol):
    """The part of the connection that a request uses."""

    loop: asyncio.AbstractEventLoop
    bounds: Bounds
    memory: BodyMemory
    slices: SliceQueue
    writer: ClientWriter
    client_address: str | None
    registered_key: str | None

    def keeps_alive(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""

    def resume_reading(self) -> None:
        """Reads on, because the handler has taken the buffered part of the body."""

    def register_key(self, key: str | None) -> str | None:
        """Accepts a request with this key. Returns the reason why the request must be refused, or ``None``."""


class Request:
    """A request, whose body may still be on its way.

    - ``target``: path and query as they came. ``path``: the path without the query, decoded.
    - ``id``: the client's X-Request-Id, if it has sent a usable one.
    - ``received_at``: when the head was complete, in seconds of the server's clock.
    - ``client_address``: the client's IP address, or ``UNIX_CLIENT``; ``None`` if it is not known.
    - ``key``: the API key that the client has sent; ``None`` if the gateway needs none, or before it was checked.
    - ``cors``: header fields that every answer to the request gets.
    - ``stream``: the answer, if it is written in pieces. ``heartbeat``: keeps it from being silent; ``None`` if it may
      be.
    - ``body``: only for the connection, which feeds it. Handlers read the body with the methods here.
    """

    __slots__ = (
        "_connection",
        "body",
        "client_address",
        "cors",
        "headers",
        "heartbeat",
        "id",
        "is_http10",
        "keep_alive",
        "key",
        "method",
        "path",
        "received_at",
        "stream",
        "target",
    )

    def __init__(self, connection: RequestConnection, head: RequestHead, received_at: float) -> None:
        self._connection = connection
        self.method = head.method
        # Most targets hold no "#", "?" or "%". To test for them costs less than the calls do.
        target = head.target
        if "#" in target or not target.startswith("/"):
            target = _normalize_target(target)
        self.target = target
        path = target.partition("?")[0] if "?" in target else target
        self.path = unquote(path) if "%" in path else path
        self.headers = head.headers
        self.is_http10 = head.is_http10
        self.keep_alive = head.keep_alive
        self.received_at = received_at
        self.client_address = connection.client_address
        request_id = head.headers.get("x-request-id")
        self.id = None if request_id is None else _make_safe_id(request_id)
        self.cors: dict[str, str] | None = None
        self.key: ClientKey | None = None
        self.body = RequestBody(connection.memory)
        self.stream: StreamingResponse | None = None
        self.heartbeat: Heartbeat | None = None

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {self.body!r} {self.stream!r}>"

    @property
    def body_received(self) -> bool:
        """Whether the whole body has come. The handler may not have read it yet."""
        return self.body.whole

    @property
    def answer_started(self) -> bool:
        """Whether a part of a streamed answer may have been sent."""
        return self.stream is not None and self.stream.started

    @property
    def unfinished_stream(self) -> StreamingResponse | None:
        """The streamed answer if a part of it may have been sent, but not its end; otherwise ``None``."""
        stream = self.stream
        if stream is None or not stream.started or stream.finished:
            return None
        return stream

    @property
    def sent_bytes(self) -> int:
        """The number of bytes of a streamed answer's body, with their framing, that have been written."""
        return 0 if self.stream is None else self.stream.sent_bytes

    def register_key(self, key: str | None) -> None:
        """Counts the connection for this key, which is valid. Raises QueueFull when too many connections have the same
        key."""
        connection = self._connection
        if key == connection.registered_key:  # the request before this one had the same key
            return
        refusal = connection.register_key(key)
        if refusal is not None:
            raise QueueFull(refusal, retry_after_s=1.0)

    def end(self) -> None:
        """Releases the body, and forgets the callback of the handler, because the handler has ended."""
        self.body.release()
        writer = self._connection.writer
        writer.on_writable = writer.on_backpressure = None

    # -- the body ----------------------------------------------------------------------------------------------------

    @property
    def _max_body_bytes(self) -> int:
        """The longest body that may be read as a whole: by the bounds, and by the memory for bodies."""
        return min(self._connection.bounds.max_body_bytes, self._connection.memory.max_body_bytes)

    def take_body(self) -> bytes | None:
        """Returns the body if all of it has come and it is not packed, as is the case for nearly all requests.
        Otherwise returns ``None``: then call ``read_body``. Raises BadRequest if the body is too large."""
        body = self.body
        if not body.whole or body.reservation.refused or "content-encoding" in self.headers:
            return None
        if body.buffered > self._max_body_bytes:
            raise body_too_large()
        return body.take()

    async def read_body(self) -> bytes:
        """Waits for the whole body, and returns it unpacked. Raises BadRequest if the body is too large, too slow, or
        not as its head says. Raises QueueFull if there is no room for the body."""
        whole_body = self.take_body()
        if whole_body is not None:
            return whole_body
        memory, bounds, body = self._connection.memory, self._connection.bounds, self.body
        limit = self._max_body_bytes
        encoding = self.headers.get("content-encoding", "")
        length = (self.headers.get("content-length") or "").lstrip("0")  # empty: not given, or 0
        if length:
            if len(length) > MAX_LENGTH_DIGITS or int(length) > limit:
                raise body_too_large()
            if not body.reservation.can_reserve(int(length)):
                raise memory.build_full_error()
        decompressor = None
        if encoding and encoding.lower() != "identity":
            decompressor = Decompressor(encoding.lower(), min(bounds.max_unpacked_bytes, limit))
        return await self._join_body(limit, decompressor)

    async def _join_body(self, limit: int, decompressor: Decompressor | None) -> bytes:
        """Reads the body piece by piece, and returns it unpacked. ``limit`` is in bytes of the unpacked body."""
        joined = BytesIO()  # its ``getvalue`` makes no copy
        reservation = self.body.reservation
        async for piece in self._reserved_pieces():
            if decompressor is None:
                joined.write(piece)
            else:
                for unpacked_piece in await self.run_sliced(decompressor.feed(piece)):
                    if not reservation.reserve(len(unpacked_piece)):
                        raise self._connection.memory.build_full_error()
                    joined.write(unpacked_piece)
                reservation.release_bytes(len(piece))
            if joined.tell() > limit:
                raise body_too_large()
        if decompressor is not None:
            decompressor.end()
        return joined.getvalue()

    async def read_body_pieces(self) -> AsyncIterator[bytes]:
        """Yields the body as it comes, of any length, and packed if the client has packed it. The memory of a piece is
        released when the caller asks for the next piece. Raises BadRequest for a body that is too slow or not as its
        head says. Raises QueueFull if there is no room for a piece."""
        async for piece in self._reserved_pieces():
            yield piece
            self.body.reservation.release_bytes(len(piece))

    async def _reserved_pieces(self) -> AsyncIterator[bytes]:
        """Yields the body as it comes. The memory of each piece stays reserved. Raises as ``read_body_pieces``."""
        body, bounds, loop = self.body, self._connection.bounds, self._connection.loop
        self._send_continue()
        if not body.whole:
            body.reservation.start_reading(body.wake)
        waited_s, received_bytes = 0.0, 0  # only the waits for the client count, not the time that the handler takes
        while True:
            if body.reservation.refused:
                raise self._connection.memory.build_full_error()
            if body.complete:
                body.reservation.finish_reading()
            if body.buffered:
                piece = body.take()
                self._connection.resume_reading()
                received_bytes += len(piece)
                yield piece
            elif body.broken:
                raise BadRequest("the request body is not what its head says")
            elif body.complete:
                return
            else:
                started_at = loop.time()
                allowed_s = bounds.body_timeout_s + received_bytes / bounds.min_bytes_per_s
                try:
                    async with asyncio.timeout(allowed_s - waited_s):
                        await body.wait_for_change()
                except TimeoutError:
                    raise BadRequest("the request body came too slowly", status=408) from None
                waited_s += loop.time() - started_at

    def _send_continue(self) -> None:
        """Tells a client that asks for it (``Expect: 100-continue``) to send the body. curl and others ask before they
        send a large body, and wait a second if they get no answer. Raises BadRequest for another expectation."""
        expectation = self.headers.get("expect")
        if expectation is None:
            return
        if expectation.lower() != "100-continue":
            raise BadRequest("this expectation cannot be met", status=417)
        if not self.is_http10 and not self.answer_started:
            self._connection.writer.write(CONTINUE)

    async def run_sliced(self, work: Generator[None, None, T]) -> T:
        """Runs long work, one step in each turn of the event loop (``SliceQueue``), and returns its result."""
        return await self._connection.slices.run(work)

    # -- memory for data that is built from the body -----------------------------------------------------------------

    @property
    def try_reserve_memory(self) -> Callable[[int], bool]:
        """A function that reserves more bytes for this request until it ends, and returns whether there is room. The
        function holds no reference to the request."""
        return self.body.reservation.try_reserve

    def reserve_memory(self, size: int) -> None:
        """Reserves ``size`` bytes more until the request ends. Raises QueueFull if there is no room."""
        if not self.try_reserve_memory(size):
            raise self._connection.memory.build_full_error()

    def release_memory(self, size: int) -> None:
        """Frees ``size`` of the reserved bytes."""
        self.body.reservation.release_bytes(size)

    # -- the answer --------------------------------------------------------------------------------------------------

    def answer_headers(self, headers: HeaderPairs) -> HeaderPairs:
        """Returns ``headers`` and the fields that every answer to this request gets. The latter replace fields of the
        same name."""
        if self.cors is None and self.id is None:
            return headers
        added = dict(self.cors or {})
        if self.id is not None:
            added["X-Request-Id"] = self.id
        added_names = {name.lower() for name in added}
        other_pairs = [pair for pair in headers if pair[0].lower() not in added_names]
        return (*other_pairs, *added.items())

    def start_stream(self, headers: Iterable[tuple[str, str]], *, status: int = 200) -> StreamingResponse:
        """Creates an answer that is written in pieces. The head goes out with the first piece."""
        # Whether the connection stays after this answer. With HTTP/1.0 it does not, because only its end marks the end
        # of a stream. Stored because the head promises it to the client: a later change of the connection's state must
        # not change it.
        self.keep_alive = keep_alive = not self.is_http10 and self._connection.keeps_alive(self)
        pairs = self.answer_headers(tuple(headers))
        head = render_head(status, pairs, length=None, keep_alive=keep_alive, is_http10=self.is_http10)
        send_body = not has_no_body(self.method, status)
        chunked = not self.is_http10
        self.stream = StreamingResponse(self._connection.writer, status, head, chunked=chunked, send_body=send_body)
        return self.stream


Handler = Callable[[Request], Awaitable[Response | StreamingResponse]]
"""The type of the function that answers a request. If the function raises ConnectionError, the connection is cut."""


def _normalize_target(target: str) -> str:
    """Removes the origin and the fragment of a request's target. A client that takes the server for a proxy asks for
    ``http://host/path``. A fragment (``#…``) has a meaning only for the client."""
    if not target.startswith("/") and "://" in target:
        _, _, host_and_path = target.partition("://")
        _, _, path = host_and_path.partition("/")
        target = f"/{path}"
    without_fragment, _, _ = target.partition("#")
    return without_fragment


def _make_safe_id(request_id: str) -> str | None:
    """Shortens a client's X-Request-Id. Returns ``None`` if the id is empty, or not safe in a header or a log."""
    is_safe = request_id.isascii() and request_id.isprintable()
    return request_id[:MAX_ID_LENGTH] if request_id and is_safe else None
