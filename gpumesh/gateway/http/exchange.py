"""A client's request and its answer, as a handler has them; what carries both is a ``Connection`` (connection.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from io import BytesIO
from typing import Protocol, TypeVar
from urllib.parse import unquote

from gpumesh.errors import GPUMeshError, QueueFull
from gpumesh.gateway.http import responses
from gpumesh.gateway.http.body_memory import BodyMemory, MemoryReservation, SlicedWorkRunner
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.decompression import Decompressor
from gpumesh.gateway.http.responses import Headers, Response
from gpumesh.gateway.model_requests import BadRequest
from gpumesh.gateway.observe.record import RequestRecord

T = TypeVar("T")

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_ID = 128  # of a client's X-Request-Id


class ClientTransport(Protocol):
    """The connection, as far as a request and its answer know it. ``backpressured``: its client reads more slowly than
    it is written to."""

    loop: asyncio.AbstractEventLoop
    bounds: Bounds
    memory: BodyMemory
    work_runner: SlicedWorkRunner
    backpressured: bool
    client_address: str | None
    on_writable: Callable[[], None] | None
    """Called each time that the client has taken most of what was written to it, and when the client is gone."""

    @property
    def unacknowledged_bytes(self) -> int | None:
        """Bytes that were written and that the client's system has not acknowledged; ``None`` where that is not
        known."""

    def keeps_alive(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""

    def write(self, data: bytes) -> None:
        """Raises ConnectionResetError when the client is gone."""

    async def wait_writable(self) -> None:
        """Returns when the client has taken most of what was written. Raises ConnectionResetError when it is gone."""

    def continue_reading(self) -> None:
        """What waited has been taken: more may be read."""

    def register_key(self, key: str | None) -> str | None:
        """A request with this key is accepted; or why it must be refused."""


class ClientStalled(GPUMeshError):
    """A client does not read, and others wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the client took nothing of this answer for {seconds:g} s, and others wait for its node")


class Request:
    """A request, its record, and what its answer's head must say on its account.

    ``target`` is path and query as they came, ``path`` decoded. ``answer_started``: a part of its answer may have been
    sent, ``unfinished_stream`` by a stream that has not ended; ``sent_bytes`` counts the bytes of its body, those of a
    stream with its framing.
    """

    __slots__ = (
        "_body",
        "_connection",
        "answer_started",
        "cors",
        "headers",
        "id",
        "is_http10",
        "keep_alive",
        "method",
        "path",
        "record",
        "sent_bytes",
        "target",
        "unfinished_stream",
    )

    def __init__(
        self,
        connection: ClientTransport,
        method: str,
        target: str,
        headers: Headers,
        *,
        is_http10: bool,
        keep_alive: bool,
        record: RequestRecord,
    ) -> None:
        self._connection = connection
        self._body = RequestBody(connection.memory)
        self.method = method
        self.target = _own(target)
        self.path = _path(self.target)
        self.headers = headers
        self.is_http10 = is_http10
        self.keep_alive = keep_alive
        self.record = record
        self.cors: dict[str, str] | None = None
        self.id = _id(headers.get("X-Request-Id"))
        self.answer_started = False
        self.unfinished_stream: StreamingResponse | None = None
        self.sent_bytes = 0

    @property
    def client_address(self) -> str | None:
        """The client's address."""
        return self._connection.client_address

    def register_key(self, key: str | None) -> None:
        """It may be served, as far as who asks is concerned: the client's key counts its connections from now on.
        Raises QueueFull when those with this key are too many."""
        refusal = self._connection.register_key(key)
        if refusal is not None:
            raise QueueFull(refusal, retry_after_s=1.0)

    async def read_body(self) -> bytes:
        """The whole body, unpacked. Raises BadRequest: too large, too slow, not as its head says; and QueueFull where
        there is no room for it."""
        memory, bounds = self._connection.memory, self._connection.bounds
        limit = min(bounds.max_body_bytes, memory.max_body_bytes)
        encoding = self.headers.get("Content-Encoding", "")
        if self._body.whole and not encoding and not self._body.share.refused:  # by far the most common
            body = self._body.take()
            if len(body) > limit:
                raise _too_large()
            return body
        length = (self.headers.get("Content-Length") or "").lstrip("0")  # int() takes no more than 4,300 digits
        if length:
            if len(length) > 18 or int(length) > limit:
                raise _too_large()
            if not self._body.share.can_reserve(int(length)):
                raise memory.build_full_error()
        unpacking = None
        if encoding and encoding.lower() != "identity":
            unpacking = Decompressor(encoding.lower(), min(bounds.max_unpacked_bytes, limit))
        return await self._gather(limit, unpacking)

    async def _gather(self, limit: int, unpacking: Decompressor | None) -> bytes:
        body, share = BytesIO(), self._body.share  # whose bytes become ours without a copy
        async for piece in self._pieces():
            if unpacking is None:
                body.write(piece)
            else:
                for plain in await self.run_sliced(unpacking.feed(piece)):
                    if not share.reserve(len(plain)):
                        raise self._connection.memory.build_full_error()
                    body.write(plain)
                share.release_bytes(len(piece))
            if body.tell() > limit:
                raise _too_large()
        if unpacking is not None:
            unpacking.end()
        return body.getvalue()

    async def run_sliced(self, work: Generator[None, None, T]) -> T:
        """The result of something that takes long (``body_memory.SlicedWorkRunner``)."""
        return await self._connection.work_runner.run(work)

    @property
    def try_reserve_memory(self) -> Callable[[int], bool]:
        """Says whether so many bytes more may be held for this request until it ends. Who keeps it keeps no request."""
        return self._body.share.try_reserve

    def reserve_memory(self, size: int) -> None:
        """Raises QueueFull where there is no room."""
        if not self.try_reserve_memory(size):
            raise self._connection.memory.build_full_error()

    def release_memory(self, size: int) -> None:
        """So many bytes of it are held no longer."""
        self._body.share.release_bytes(size)

    async def read_body_pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any length; each piece is the caller's only until it asks for the next. Raises
        BadRequest: too slow, not as its head says; and QueueFull where there is no room for a piece."""
        async for piece in self._pieces():
            yield piece
            self._body.share.release_bytes(len(piece))

    async def _pieces(self) -> AsyncIterator[bytes]:
        """These stay counted as held."""
        body, bounds, loop = self._body, self._connection.bounds, self._connection.loop
        self._go_on()
        if not body.whole:
            body.share.start_reading(body.wake)
        waited_s, size = 0.0, 0  # for the client: how long a handler takes is not its fault
        while True:
            if body.share.refused:
                raise self._connection.memory.build_full_error()
            if body.complete:
                body.share.finish_reading()
            if body.pieces:
                piece = body.take()
                self._connection.continue_reading()
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
                        await body.more(loop)
                except TimeoutError:
                    raise BadRequest("the request body came too slowly", status=408) from None
                waited_s += loop.time() - began

    def _go_on(self) -> None:
        """curl and others ask before they send something large, and wait a second if nobody answers."""
        expect = self.headers.get("Expect")
        if expect is None:
            return
        if expect.lower() != "100-continue":
            raise BadRequest("this expectation cannot be met", status=417)
        if not self.is_http10 and not self.answer_started:
            self._connection.write(CONTINUE)

    def answer_headers(self, headers: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
        """These, and what every answer to this request says."""
        if self.cors is None and self.id is None:
            return headers
        more = dict(self.cors or {})
        if self.id is not None:
            more["X-Request-Id"] = self.id
        lower = {name.lower() for name in more}
        return [*((name, value) for name, value in headers if name.lower() not in lower), *more.items()]

    def start_stream(self, headers: Iterable[tuple[str, str]], *, status: int = 200) -> StreamingResponse:
        """An answer in pieces; its head goes out with the first of them."""
        return StreamingResponse(self, self._connection, status, headers)

    @property
    def body_received(self) -> bool:
        return self._body.whole

    @property
    def buffered(self) -> int:
        """Bytes of the body that wait for the handler."""
        return self._body.buffered

    # -- the connection's side -----------------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """A piece of the body; how many bytes wait now."""
        return self._body.feed(data)

    def end_body(self, *, broken: bool = False) -> None:
        self._body.end(broken=broken)

    def release(self) -> None:
        """It has ended, or will never be served: nothing of its body is held any longer."""
        self._body.release()


class RequestBody:
    """A request's body on its way from the parser to the handler. What finds no room in the memory is dropped."""

    __slots__ = ("_waiter", "broken", "buffered", "complete", "pieces", "share")

    def __init__(self, memory: BodyMemory) -> None:
        self.pieces: list[bytes] = []
        self.complete = False
        self.broken = False
        self.share = MemoryReservation(memory)
        self.buffered = 0
        self._waiter: asyncio.Future[None] | None = None

    @property
    def whole(self) -> bool:
        return self.complete and not self.broken

    def feed(self, data: bytes) -> int:
        if self.share.reserve(len(data)):
            self.pieces.append(data)
            self.buffered += len(data)
        else:
            self._drop()
        self.wake()
        return self.buffered

    def end(self, *, broken: bool) -> None:
        self.complete = True
        self.broken |= broken
        self.wake()

    def take(self) -> bytes:
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self._drop()
        return data

    def release(self) -> None:
        self.share.release()
        if self.pieces:
            self._drop()

    def _drop(self) -> None:
        self.pieces.clear()
        self.buffered = 0

    async def more(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class StreamingResponse:
    """An answer in pieces. ``write``, then ``drain`` where it is ``backpressured``; ``finish`` makes it whole: without
    that the connection is cut, so that nobody takes a part for all."""

    __slots__ = ("_chunked", "_connection", "_head", "_request", "_silent", "finished", "status")

    def __init__(
        self, request: Request, connection: ClientTransport, status: int, headers: Iterable[tuple[str, str]]
    ) -> None:
        self.status = status
        self.finished = False
        self._request = request
        self._connection = connection
        self._chunked = not request.is_http10
        self._silent = responses.has_no_body(request.method, status)
        # Of an old client's the end is the connection's; and what the head says stays true, whatever comes after it.
        request.keep_alive = keep = not request.is_http10 and connection.keeps_alive(request)
        self._head = responses.render_head(
            status, request.answer_headers(headers), length=None, keep_alive=keep, is_http10=request.is_http10
        )

    @property
    def backpressured(self) -> bool:
        """The client reads more slowly than it is written to."""
        return self._connection.backpressured

    @property
    def on_writable(self) -> Callable[[], None] | None:
        """Called each time that the stream is no longer ``backpressured``, and when the client is gone: ``write`` then
        raises ConnectionResetError. The connection drops it when the request's handler has ended."""
        return self._connection.on_writable

    @on_writable.setter
    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._connection.on_writable = callback

    def write(self, data: bytes) -> None:
        """Raises ConnectionError when the client is gone."""
        out = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data
        if self._silent:
            out = b""
        self._request.sent_bytes += len(out)
        if self._head:
            out, self._head = self._head + out, b""
            self._request.answer_started = True
            self._request.unfinished_stream = self
        self._connection.write(out)

    async def drain(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Waits until the client has taken most of it. Raises ConnectionError when the client is gone, and
        ClientStalled when it has taken nothing for ``stalled_s`` and, as ``is_wanted`` tells, others wait for what it
        holds."""
        connection = self._connection
        while connection.backpressured:
            before = connection.unacknowledged_bytes
            try:
                async with asyncio.timeout(connection.bounds.stall_timeout_s):
                    await connection.wait_writable()
            except TimeoutError:
                if before is not None and before <= (connection.unacknowledged_bytes or 0) and is_wanted():
                    raise ClientStalled(connection.bounds.stall_timeout_s) from None

    def finish(self) -> None:
        self.finished = True
        self._request.unfinished_stream = None
        if self._head:
            self.write(b"")
        if self._chunked and not self._silent:
            self._connection.write(b"0\r\n\r\n")


Handler = Callable[[Request], Awaitable[Response | StreamingResponse]]


def _own(target: str) -> str:
    """Of a request's target what is asked of us: ``http://host/path`` is how a client would ask a proxy, and a fragment
    is its own affair."""
    if not target.startswith("/") and "://" in target:
        target = "/" + target.partition("://")[2].partition("/")[2]
    return target.partition("#")[0] if "#" in target else target


def _path(target: str) -> str:
    path = target.partition("?")[0] if "?" in target else target
    return unquote(path) if "%" in path else path


def _id(given: str | None) -> str | None:
    """What a client calls its request: a short word that is safe in a header and in a log, or nothing."""
    if not given or not given.isascii() or not given.isprintable():
        return None
    return given[:MAX_ID]


def _too_large() -> BadRequest:
    return BadRequest("the request body is too large", status=413)
