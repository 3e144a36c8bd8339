"""A client's request and its answer, as a handler has them; what carries both is a ``Connection`` (connection.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from io import BytesIO
from typing import Protocol, TypeVar
from urllib.parse import unquote

from gpumesh.errors import GPUMeshError, QueueFull
from gpumesh.gateway.http import replies
from gpumesh.gateway.http.body_memory import BodyMemory, LongWork, Share
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.decompression import Unpacking
from gpumesh.gateway.http.replies import Headers, Reply
from gpumesh.gateway.model_requests import BadRequest
from gpumesh.gateway.observe.record import Record

T = TypeVar("T")

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_ID = 128  # of a client's X-Request-Id


class Carrier(Protocol):
    """The connection, as far as a request and its answer know it. ``full``: its client reads more slowly than it is
    written to."""

    loop: asyncio.AbstractEventLoop
    bounds: Bounds
    memory: BodyMemory
    long_work: LongWork
    full: bool
    remote: str | None

    @property
    def untaken(self) -> int | None:
        """Bytes that were written and that the client's system has not acknowledged; ``None`` where that is not
        known."""

    def keeps(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""

    def write(self, data: bytes) -> None:
        """Raises ConnectionResetError when the client is gone."""

    async def room(self) -> None:
        """Returns when the client has taken most of what was written. Raises ConnectionResetError when it is gone."""

    def read_on(self) -> None:
        """What waited has been taken: more may be read."""

    def accept(self, key: str | None) -> str | None:
        """A request with this key is accepted; or why it must be refused."""


class ClientStalled(GPUMeshError):
    """A client does not read, and others wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the client took nothing of this answer for {seconds:g} s, and others wait for its node")


class Request:
    """A request, its record, and what its answer's head must say on its account.

    ``target`` is path and query as they came, ``path`` decoded. ``begun``: a part of its answer may have been sent,
    ``begun_stream`` by a stream that has not ended;
    ``sent`` counts the bytes of its body, those of a stream with its framing.
    """

    __slots__ = (
        "_body",
        "_connection",
        "begun",
        "begun_stream",
        "cors",
        "headers",
        "id",
        "keep",
        "method",
        "old",
        "path",
        "record",
        "sent",
        "target",
    )

    def __init__(
        self,
        connection: Carrier,
        method: str,
        target: str,
        headers: Headers,
        *,
        old: bool,
        keep: bool,
        record: Record,
    ) -> None:
        self._connection = connection
        self._body = Body(connection.memory)
        self.method = method
        self.target = _own(target)
        self.path = _path(self.target)
        self.headers = headers
        self.old = old
        self.keep = keep
        self.record = record
        self.cors: dict[str, str] | None = None
        self.id = _id(headers.get("X-Request-Id"))
        self.begun = False
        self.begun_stream: Stream | None = None
        self.sent = 0

    @property
    def remote(self) -> str | None:
        """The client's address."""
        return self._connection.remote

    def accept(self, key: str | None) -> None:
        """It may be served, as far as who asks is concerned: the client's key counts its connections from now on.
        Raises QueueFull when those with this key are too many."""
        refusal = self._connection.accept(key)
        if refusal is not None:
            raise QueueFull(refusal, retry_after_s=1.0)

    async def body(self) -> bytes:
        """The whole body, unpacked. Raises BadRequest: too large, too slow, not as its head says; and QueueFull where
        there is no room for it."""
        memory, bounds = self._connection.memory, self._connection.bounds
        limit = min(bounds.body_bytes, memory.largest)
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
            if not self._body.share.would_fit(int(length)):
                raise memory.full()
        unpacking = None
        if encoding and encoding.lower() != "identity":
            unpacking = Unpacking(encoding.lower(), min(bounds.unpacked_bytes, limit))
        return await self._gather(limit, unpacking)

    async def _gather(self, limit: int, unpacking: Unpacking | None) -> bytes:
        body, share = BytesIO(), self._body.share  # whose bytes become ours without a copy
        async for piece in self._pieces():
            if unpacking is None:
                body.write(piece)
            else:
                for plain in await self.work(unpacking.feed(piece)):
                    if not share.take(len(plain)):
                        raise self._connection.memory.full()
                    body.write(plain)
                share.give_back(len(piece))
            if body.tell() > limit:
                raise _too_large()
        if unpacking is not None:
            unpacking.end()
        return body.getvalue()

    async def work(self, work: Generator[None, None, T]) -> T:
        """The result of something that takes long (``body_memory.LongWork``)."""
        return await self._connection.long_work.run(work)

    @property
    def hold(self) -> Callable[[int], bool]:
        """Says whether so many bytes more may be held for this request until it ends. Who keeps it keeps no request."""
        return self._body.share.try_take

    def must_hold(self, size: int) -> None:
        """Raises QueueFull where there is no room."""
        if not self.hold(size):
            raise self._connection.memory.full()

    def let_go(self, size: int) -> None:
        """So many bytes of it are held no longer."""
        self._body.share.give_back(size)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any length; each piece is the caller's only until it asks for the next. Raises
        BadRequest: too slow, not as its head says; and QueueFull where there is no room for a piece."""
        async for piece in self._pieces():
            yield piece
            self._body.share.give_back(len(piece))

    async def _pieces(self) -> AsyncIterator[bytes]:
        """These stay counted as held."""
        body, bounds, loop = self._body, self._connection.bounds, self._connection.loop
        self._go_on()
        if not body.whole:
            body.share.coming(body.wake)
        waited_s, size = 0.0, 0  # for the client: how long a handler takes is not its fault
        while True:
            if body.share.refused:
                raise self._connection.memory.full()
            if body.complete:
                body.share.came()
            if body.pieces:
                piece = body.take()
                self._connection.read_on()
                size += len(piece)
                yield piece
            elif body.broken:
                raise BadRequest("the request body is not what its head says")
            elif body.complete:
                return
            else:
                began = loop.time()
                try:
                    async with asyncio.timeout(bounds.body_s + size / bounds.body_rate - waited_s):
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
        if not self.old and not self.begun:
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

    def stream(self, headers: Iterable[tuple[str, str]], *, status: int = 200) -> Stream:
        """An answer in pieces; its head goes out with the first of them."""
        return Stream(self, self._connection, status, headers)

    @property
    def body_ended(self) -> bool:
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


class Body:
    """A request's body on its way from the parser to the handler. What finds no room in the memory is dropped."""

    __slots__ = ("_waiter", "broken", "buffered", "complete", "pieces", "share")

    def __init__(self, memory: BodyMemory) -> None:
        self.pieces: list[bytes] = []
        self.complete = False
        self.broken = False
        self.share = Share(memory)
        self.buffered = 0
        self._waiter: asyncio.Future[None] | None = None

    @property
    def whole(self) -> bool:
        return self.complete and not self.broken

    def feed(self, data: bytes) -> int:
        if self.share.take(len(data)):
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


class Stream:
    """An answer in pieces. ``write``, then ``drain`` where it is ``full``; ``end`` makes it whole: without that the
    connection is cut, so that nobody takes a part for all."""

    __slots__ = ("_chunked", "_connection", "_head", "_request", "_silent", "ended", "status")

    def __init__(self, request: Request, connection: Carrier, status: int, headers: Iterable[tuple[str, str]]) -> None:
        self.status = status
        self.ended = False
        self._request = request
        self._connection = connection
        self._chunked = not request.old
        self._silent = replies.bodiless(request.method, status)
        # Of an old client's the end is the connection's; and what the head says stays true, whatever comes after it.
        request.keep = keep = not request.old and connection.keeps(request)
        self._head = replies.head(status, request.answer_headers(headers), length=None, keep=keep, old=request.old)

    @property
    def full(self) -> bool:
        """The client reads more slowly than it is written to."""
        return self._connection.full

    def write(self, data: bytes) -> None:
        """Raises ConnectionError when the client is gone."""
        out = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data
        if self._silent:
            out = b""
        self._request.sent += len(out)
        if self._head:
            out, self._head = self._head + out, b""
            self._request.begun = True
            self._request.begun_stream = self
        self._connection.write(out)

    async def drain(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Waits until the client has taken most of it. Raises ConnectionError when the client is gone, and
        ClientStalled when it has taken nothing for ``stalled_s`` and, as ``is_wanted`` tells, others wait for what it
        holds."""
        connection = self._connection
        while connection.full:
            before = connection.untaken
            try:
                async with asyncio.timeout(connection.bounds.stalled_s):
                    await connection.room()
            except TimeoutError:
                if before is not None and before <= (connection.untaken or 0) and is_wanted():
                    raise ClientStalled(connection.bounds.stalled_s) from None

    def end(self) -> None:
        self.ended = True
        self._request.begun_stream = None
        if self._head:
            self.write(b"")
        if self._chunked and not self._silent:
            self._connection.write(b"0\r\n\r\n")


Handler = Callable[[Request], Awaitable[Reply | Stream]]


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
