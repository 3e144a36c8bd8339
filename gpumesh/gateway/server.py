"""The gateway's HTTP/1.1 server, on an ``asyncio.Protocol`` and httptools (llhttp, the parser of Node.js and uvicorn).

Our own, because each token passes here (`benchmarks/gateway.py`), and because in front of hardware that costs money
everything that a client can hold needs a bound. It could hold a connection, a handler or a node's place for ever: by a
head that never gets complete (slow loris), by a body that hardly moves, by not reading its answer, by asking ahead
without end, or by opening more connections than the process may have files. Each of these has its bound here, and each
refusal is an answer that says so, without a byte of what the client sent.

A connection has one task while it has requests, which serves them in their order. Its client leaving cancels it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote

import httptools

from gpumesh.gateway import replies
from gpumesh.gateway.record import Record
from gpumesh.gateway.replies import Headers, Reply, json_reply
from gpumesh.gateway.requests import BadRequest

log = logging.getLogger(__name__)

RESERVED_FILES = 256  # of the process's open files: tunnels, probes, log, sockets of other commands
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_ID = 128  # of a client's X-Request-Id
MAX_FIELDS = 128  # of a head
AHEAD = 16  # requests that a client may have sent before the first is answered, until it is no longer read
BODY_BUFFER = 256 << 10  # bytes of a body that wait for their handler, until the client is no longer read


class _HeadTooLarge(Exception):
    """Raised through the parser."""


def connections_allowed() -> int:
    """As many as the process may have open, when each has one to a node as well."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 20
    return max((soft - RESERVED_FILES) // 2, 64)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds, bytes, and bytes/s. A body may take ``body_s``, and a second more for each ``body_rate`` bytes of it."""

    head_s: float = 30.0
    head_bytes: int = 32 << 10
    body_s: float = 30.0
    body_rate: int = 4 << 10
    body_bytes: int = 256 << 20  # images come inside of JSON
    linger_s: float = 2.0  # a refused body is read for so long, so that its client sees the refusal and not a reset
    write_s: float = 60.0  # a client that takes nothing for so long is gone
    keepalive_s: float = (
        120.0  # longer than the clients' own (90 s in Go): then it is they who close, and nothing races
    )
    connections: int | None = None  # None: connections_allowed()


class Request:
    """A request, its record, and what its answer's head must say on its account.

    ``path`` is decoded, ``target`` as it came. ``begun``: a part of its answer may have been sent; ``sent`` counts the
    bytes of its body, those of a stream with its framing.
    """

    __slots__ = (
        "_body",
        "_connection",
        "begun",
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
        connection: Connection,
        method: str,
        target: str,
        headers: Headers,
        *,
        old: bool,
        keep: bool,
        record: Record,
    ) -> None:
        self._connection = connection
        self._body = _Body()
        self.method = method
        self.target = target
        self.path = _path(target)
        self.headers = headers
        self.old = old
        self.keep = keep
        self.record = record
        self.cors: dict[str, str] | None = None
        self.id = _id(headers.get("X-Request-Id"))
        self.begun = False
        self.sent = 0

    @property
    def remote(self) -> str | None:
        """The client's address."""
        return self._connection.remote

    async def body(self) -> bytes:
        """The whole body, unpacked. Raises BadRequest: too large, too slow, not as its head says."""
        limit = self._connection.bounds.body_bytes
        length = self.headers.get("Content-Length")
        if length is not None and int(length) > limit:
            raise _too_large()
        if self._body.whole:  # by far the most common: it came together with the head
            body = self._body.take()
            if len(body) > limit:
                raise _too_large()
        else:
            pieces = bytearray()
            async for piece in self.pieces():
                pieces += piece
                if len(pieces) > limit:
                    raise _too_large()
            body = bytes(pieces)
        encoding = self.headers.get("Content-Encoding")
        return body if encoding is None else _unpacked(body, encoding.strip().lower(), limit)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any length. Raises BadRequest: too slow, not as its head says."""
        self._go_on()
        body, bounds, loop = self._body, self._connection.bounds, self._connection.loop
        began, size = loop.time(), 0
        while True:
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
                try:
                    async with asyncio.timeout_at(began + bounds.body_s + size / bounds.body_rate):
                        await body.more(loop)
                except TimeoutError:
                    raise BadRequest("the request body came too slowly", status=408) from None

    def _go_on(self) -> None:
        """curl and others ask before they send something large, and wait a second if nobody answers."""
        expect = self.headers.get("Expect")
        if expect is None:
            return
        if expect.strip().lower() != "100-continue":
            raise BadRequest("this expectation cannot be met", status=417)
        if not self.old:
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

    # -- the connection's side -----------------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """A piece of the body; how many bytes wait now."""
        return self._body.feed(data)

    def end_body(self, *, broken: bool = False) -> None:
        self._body.end(broken=broken)


class _Body:
    """A request's body on its way from the parser to the handler."""

    __slots__ = ("_size", "_waiter", "broken", "complete", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.complete = False
        self.broken = False
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    @property
    def whole(self) -> bool:
        return self.complete and not self.broken

    def feed(self, data: bytes) -> int:
        self.pieces.append(data)
        self._size += len(data)
        self._wake()
        return self._size

    def end(self, *, broken: bool) -> None:
        self.complete = True
        self.broken |= broken
        self._wake()

    def take(self) -> bytes:
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self._size = 0
        return data

    async def more(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Stream:
    """An answer in pieces. ``write``, then ``drain`` where it is ``full``; ``end`` makes it whole: without that the
    connection is cut, so that nobody takes a part for all."""

    __slots__ = ("_chunked", "_connection", "_head", "_request", "_silent", "ended", "status")

    def __init__(
        self, request: Request, connection: Connection, status: int, headers: Iterable[tuple[str, str]]
    ) -> None:
        self.status = status
        self.ended = False
        self._request = request
        self._connection = connection
        self._chunked = not request.old
        self._silent = replies.bodiless(request.method, status)
        if request.old:
            request.keep = False  # its end is the connection's
        self._head = replies.head(
            status, request.answer_headers(headers), length=None, keep=connection.keeps(request), old=request.old
        )

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
        self._connection.write(out)

    async def drain(self) -> None:
        """Waits until the client has taken most of it. Raises ConnectionError when the client is gone."""
        await self._connection.room()

    def end(self) -> None:
        self.ended = True
        if self._head:
            self.write(b"")
        if self._chunked and not self._silent:
            self._connection.write(b"0\r\n\r\n")


Handler = Callable[[Request], Awaitable[Reply | Stream]]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The answer to what is no request, in its turn. After it the connection ends."""

    status: int
    words: str


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.bounds = server.bounds
        self.full = False
        self.remote: str | None = None
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        # The message that is being read.
        self._url = b""
        self._fields: list[tuple[str, str]] = []
        self._head_size = 0
        self._in_head = False
        self._incoming: Request | None = None
        self._upgrade_body: bytes | None = None
        self._replayed = False
        # Those that have been read.
        self._waiting: deque[Request | _Refusal] = deque()
        self._task: asyncio.Task[None] | None = None
        self._deaf = False
        self._closing = False
        self._read_paused = False
        self._room: asyncio.Future[None] | None = None
        self._quiet_since = loop.time()
        self._quiet_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class
        if not self._server.admit(self):
            self._transport.write(_plain(_Refusal(503, "too many connections"), ("Retry-After", "1")))
            self._transport.close()
            self._transport, self._deaf = None, True
            return
        peer = transport.get_extra_info("peername")
        self.remote = peer[0] if isinstance(peer, tuple) else None
        self._quiet_timer = self.loop.call_later(self.bounds.keepalive_s, self._quiet)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self._transport = None
        self._deaf = True
        self._server.forget(self)
        for timer in (self._quiet_timer, self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        if self._room is not None and not self._room.done():
            self._room.set_exception(ConnectionResetError("the client is gone"))
            self._room.exception()  # seen, if nobody waits any more
        if self._incoming is not None:
            self._incoming.end_body(broken=True)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        while data and not self._deaf:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._go_on_without_upgrade()
                continue
            except httptools.HttpParserError as error:
                self._malformed(error)
                return
            if self._in_head:
                self._head_size += len(data)  # the parser keeps what is no whole field yet
                if self._head_size > self.bounds.head_bytes:
                    self._refuse(_Refusal(431, "the request's head is too large"))
                elif self._head_timer is None:
                    self._head_timer = self.loop.call_later(self.bounds.head_s, self._head_too_slow)
            return

    def pause_writing(self) -> None:
        self.full = True
        self._write_timer = self.loop.call_later(self.bounds.write_s, self.abort)

    def resume_writing(self) -> None:
        self.full = False
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    # -- httptools -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._replayed:
            return
        self._url, self._fields, self._head_size, self._in_head = b"", [], 0, True

    def on_url(self, url: bytes) -> None:
        if self._replayed:
            return
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replayed:
            return
        self._count(len(name) + len(value))
        if self._in_head:  # else it is a trailer, which nobody here needs
            self._fields.append((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")))
            if len(self._fields) > MAX_FIELDS:
                raise _HeadTooLarge

    def on_headers_complete(self) -> None:
        if self._replayed:
            self._replayed = False
            return
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        parser = self._parser
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._refuse(_Refusal(400, "HTTP/1.1 and 1.0 are spoken here"))
            return
        method = parser.get_method().decode("latin-1")
        headers = Headers(tuple(self._fields))
        if parser.should_upgrade():
            self._upgrade_body = _framing(headers)
        request = Request(
            self,
            method,
            self._url.decode("utf-8", "surrogateescape"),
            headers,
            old=version == "1.0",
            keep=parser.should_keep_alive(),
            record=self._server.record(method),
        )
        self._incoming = request
        self._enqueue(request)

    def on_body(self, data: bytes) -> None:
        if self._incoming is not None and self._incoming.feed(data) > BODY_BUFFER:
            self._pause_reading()

    def on_message_complete(self) -> None:
        if self._upgrade_body:
            return  # the parser takes an offer of another protocol for the end
        if self._incoming is not None:
            self._incoming.end_body()
            self._incoming = None

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self.bounds.head_bytes:
            raise _HeadTooLarge

    def _go_on_without_upgrade(self) -> None:
        """A client offers another protocol (JDK's offers HTTP/2 in each first request), which nobody need take up: the
        request is one like any other, its body follows. The parser, though, has ended. So another one reads on; where
        a body follows, it is told its framing again."""
        body, self._upgrade_body = self._upgrade_body, None
        self._parser = httptools.HttpRequestParser(self)
        if body and not self._deaf:
            self._replayed = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + body + b"\r\n\r\n")

    # -- what is no request --------------------------------------------------------------------------------------

    def _malformed(self, error: httptools.HttpParserError) -> None:
        log.debug("a malformed request: %s", type(error).__name__)
        if self._incoming is not None:  # in its body: whoever reads that will say so
            self._deaf = True
            self._incoming.end_body(broken=True)
            self._incoming = None
        elif isinstance(error.__context__, _HeadTooLarge):
            self._refuse(_Refusal(431, "the request's head is too large"))
        else:
            self._refuse(_Refusal(400, "this is not HTTP"))

    def _head_too_slow(self) -> None:
        self._head_timer = None
        self._refuse(_Refusal(408, "the request's head came too slowly"))

    def _refuse(self, refusal: _Refusal) -> None:
        if not self._deaf:
            self._deaf = True
            self._enqueue(refusal)

    # -- serving -------------------------------------------------------------------------------------------------

    def _enqueue(self, one: Request | _Refusal) -> None:
        self._waiting.append(one)
        if self._task is None:
            self._task = self.loop.create_task(self._work())
        elif len(self._waiting) > AHEAD:
            self._pause_reading()

    async def _work(self) -> None:
        try:
            while self._waiting and self._transport is not None:
                one = self._waiting.popleft()
                if isinstance(one, _Refusal):
                    self.write(_plain(one))
                    self._linger()
                    return
                if not await self._serve(one):
                    return
                if self.full:  # who reads no answer is not answered more
                    await self.room()
                if not self._waiting:
                    self.read_on()
        except ConnectionError:
            self.abort()
        except Exception:
            log.exception("a connection failed inside", extra={"event": "request-failed"})
            self.abort()
        finally:
            self._task = None
            self._quiet_since = self.loop.time()

    async def _serve(self, request: Request) -> bool:
        """Whether the connection goes on after it. Raises ConnectionError."""
        try:
            reply = await self._server.handler(request)
        except ConnectionError:
            raise
        except Exception as error:  # a bug: it must cost one client an error and not all of them the server
            log.error("a request failed", exc_info=error, extra={"event": "request-failed"})  # noqa: TRY400
            reply = json_reply(_error("the gateway failed inside"), status=500)
            reply.close = True
        if isinstance(reply, Reply):
            if request.begun:
                raise ConnectionError("a part of another answer has been sent already")
            self._send(request, reply)
        elif not reply.ended:
            raise ConnectionError("the answer was not ended")
        if self._transport is None:
            return False
        if not request.body_ended:
            self._linger()
            return False
        if not self.keeps(request):
            self._transport.close()
            return False
        return True

    def _send(self, request: Request, reply: Reply) -> None:
        if reply.close:
            request.keep = False
        body = reply.body
        head = replies.head(
            reply.status,
            request.answer_headers(reply.headers),
            length=len(body),
            keep=self.keeps(request),
            old=request.old,
        )
        request.begun = True
        self.write(head if replies.bodiless(request.method, reply.status) else head + body)

    def keeps(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""
        return request.keep and not self._closing and request.body_ended

    def write(self, data: bytes) -> None:
        """Raises ConnectionResetError when the client is gone."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if data:
            self._transport.write(data)

    async def room(self) -> None:
        if self.full:
            if self._transport is None:
                raise ConnectionResetError("the client is gone")
            self._room = self.loop.create_future()
            try:
                await self._room
            finally:
                self._room = None

    def read_on(self) -> None:
        if self._read_paused and self._transport is not None:
            self._read_paused = False
            self._transport.resume_reading()

    def _pause_reading(self) -> None:
        if not self._read_paused and self._transport is not None:
            self._read_paused = True
            self._transport.pause_reading()

    # -- ends ----------------------------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Ends our side; what the client is still sending is read and dropped for a while, because to close on it would
        be a reset, which may overtake the answer."""
        self._deaf = True
        self._waiting.clear()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self.read_on()
        transport.write_eof()
        if self._quiet_timer is not None:
            self._quiet_timer.cancel()
        self._quiet_timer = self.loop.call_later(self.bounds.linger_s, self.abort)

    def _quiet(self) -> None:
        """Looks now and then, so that no request has to start or stop a timer."""
        quiet_s = 0.0 if self._busy else self.loop.time() - self._quiet_since
        left_s = self.bounds.keepalive_s - quiet_s
        if left_s > 0.001:
            self._quiet_timer = self.loop.call_later(left_s, self._quiet)
        elif self._transport is not None:
            self._transport.close()

    @property
    def _busy(self) -> bool:
        return self._task is not None or self._in_head

    def close_when_idle(self) -> None:
        """No more requests: an idle connection ends now, another after its answers."""
        self._closing = True
        if not self._busy and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def cancel(self) -> asyncio.Task[None] | None:
        """Ends it at once; the task that is ending, if there is one."""
        task = self._task
        if task is not None:
            task.cancel()
        self.abort()
        return task


class Server:
    """Makes a ``Connection`` for each client (``loop.create_server(server, …)``), all for one handler.

    ``turned_away`` counts those past the bound.
    """

    def __init__(self, handler: Handler, bounds: Bounds, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.handler = handler
        self.bounds = bounds
        self.turned_away = 0
        self._clock = clock
        self._most = connections_allowed() if bounds.connections is None else bounds.connections
        self._connections: set[Connection] = set()
        self._closing = False

    def __call__(self) -> Connection:
        return Connection(self, asyncio.get_running_loop())

    @property
    def connections(self) -> int:
        return len(self._connections)

    def record(self, method: str) -> Record:
        return Record(self._clock, self._clock(), method, "")

    def admit(self, connection: Connection) -> bool:
        if self._closing or len(self._connections) >= self._most:
            self.turned_away += 1
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def close_idle(self) -> None:
        """No more requests: idle connections end now, the others after their answers."""
        self._closing = True
        for connection in list(self._connections):
            connection.close_when_idle()

    async def close(self) -> None:
        """Ends whatever is left, at once."""
        self._closing = True
        tasks = [task for connection in list(self._connections) if (task := connection.cancel()) is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next round


def _path(target: str) -> str:
    """Of a request's target, decoded; ``http://host/path`` is how a client would ask a proxy."""
    path = target
    if path[:7].lower() == "http://" or path[:8].lower() == "https://":
        path = "/" + path.partition("://")[2].partition("/")[2]
    path = path.partition("#")[0].partition("?")[0]
    return unquote(path) if "%" in path else path


def _framing(headers: Headers) -> bytes | None:
    """The line of the head that says how long the body is, if there is one."""
    if headers.get("Transfer-Encoding") is not None:
        return b"Transfer-Encoding: chunked"
    length = headers.get("Content-Length")
    return None if length is None or not length.isdigit() or int(length) == 0 else b"Content-Length: " + length.encode()


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """Raises BadRequest; ``limit`` is of what comes out: a few bytes can become gigabytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BadRequest("the body's Content-Encoding is none of gzip, deflate", status=415)
    # RFC 9110 section 8.4.1.2: "deflate" has zlib's wrapping, which some clients leave out.
    raw = encoding == "deflate" and (len(body) < 2 or body[0] & 15 != 8 or int.from_bytes(body[:2], "big") % 31)
    unpack = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    try:
        plain = unpack.decompress(body, limit + 1)
    except zlib.error:
        raise BadRequest("the request body is not what its head says") from None
    if len(plain) > limit:
        raise _too_large()
    if not unpack.eof:
        raise BadRequest("the request body is not what its head says")
    return plain


def _id(given: str | None) -> str | None:
    """What a client calls its request: a short word that is safe in a header and in a log, or nothing."""
    if given is None or not given.isascii() or not given.isprintable():
        return None
    return given[:MAX_ID]


def _too_large() -> BadRequest:
    return BadRequest("the request body is too large", status=413)


def _error(words: str) -> bytes:
    """Whose dialect it would be is not known where there is no path: Ollama's."""
    return json.dumps({"error": words}).encode()


def _plain(refusal: _Refusal, *more: tuple[str, str]) -> bytes:
    """An answer outside of any request."""
    body = _error(refusal.words)
    headers = (("Content-Type", "application/json"), *more)
    return replies.head(refusal.status, headers, length=len(body), keep=False, old=False) + body
