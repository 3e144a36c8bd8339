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
import fcntl
import json
import logging
import resource
import select
import sys
import termios
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
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
SLICE = 32 << 10  # bytes that are parsed at a time: one read of 256 KiB may hold 14,000 requests
UNPACK = 256 << 10  # bytes that are unpacked at a time, under a millisecond: others' tokens wait meanwhile
LOOK_S = 0.05  # between two looks whether a client that is not read has left
AWAY = 64  # connections past the bound that may linger, so that their refusal is seen
_LEFT = getattr(select, "POLLRDHUP", 0)  # POLLHUP and POLLERR, which everybody has, are told in any case


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
    write_s: float = 60.0  # a client that takes less than body_rate for so long is gone
    keepalive_s: float = 120.0  # longer than the clients' own (90 s in Go): it is they who close, and nothing races
    connections: int | None = None  # None: connections_allowed()


class Request:
    """A request, its record, and what its answer's head must say on its account.

    ``target`` is path and query as they came, ``path`` decoded. ``begun``: a part of its answer may have been sent;
    ``sent`` counts the bytes of its body, those of a stream with its framing.
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
        self.target = _own(target)
        self.path = _path(self.target)
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
        if self._body.whole:  # by far the most common: it came together with the head
            body = self._body.take()
            if len(body) > limit:
                raise _too_large()
        else:
            length = (self.headers.get("Content-Length") or "").lstrip("0")  # int() takes no more than 4,300 digits
            if length and int(length) > limit:
                raise _too_large()
            pieces = bytearray()
            async for piece in self.pieces():
                pieces += piece
                if len(pieces) > limit:
                    raise _too_large()
            body = bytes(pieces)
        encoding = self.headers.get("Content-Encoding")
        return body if encoding is None else await _unpacked(body, encoding.lower(), limit)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any length. Raises BadRequest: too slow, not as its head says."""
        self._go_on()
        body, bounds, loop = self._body, self._connection.bounds, self._connection.loop
        waited_s, size = 0.0, 0  # for the client: how long a handler takes is not its fault
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
        self._framed = 0  # bytes that are no body's, since the last that was or the end of a message
        self._rest = b""  # of what was read, while it is not to be parsed
        self._incoming: Request | None = None
        self._upgrade_body: bytes | None = None
        self._replayed = False
        # Those that have been read.
        self._waiting: deque[Request | _Refusal] = deque()
        self._task: asyncio.Task[None] | None = None
        self._deaf = False
        self._over = False
        self._closing = False
        self._read_paused = False
        self._room: asyncio.Future[None] | None = None
        self._quiet_since = loop.time()
        self._quiet_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._lost: asyncio.Future[None] | None = None

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class
        why_not = self._server.admit(self)
        if why_not is not None:
            self.write(_plain(_Refusal(503, why_not), ("Retry-After", "1")))
            if self._server.may_linger(self):
                self._linger()
            else:
                self._close()
            return
        peer = transport.get_extra_info("peername")
        self.remote = peer[0] if isinstance(peer, tuple) else None
        self._quiet_timer = self.loop.call_later(self.bounds.keepalive_s, self._quiet)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self._transport = None
        self._deaf = True
        self._server.forget(self)
        for timer in (self._quiet_timer, self._head_timer, self._write_timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        if self._room is not None and not self._room.done():
            self._room.set_exception(ConnectionResetError("the client is gone"))
            self._room.exception()  # seen, if nobody waits any more
        if self._lost is not None:
            self._lost.set_result(None)
        if self._incoming is not None:
            self._incoming.end_body(broken=True)
        if self._task is not None:
            self._task.cancel()
        # So that nothing of it has to wait for the garbage collector.
        self._incoming, self._rest = None, b""
        self._waiting.clear()
        del self._parser

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if len(data) > SLICE:
            self._feed(data)
            return
        self._framed += len(data)
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = b"" if self._deaf else data[upgrade.args[0] :]
                self._go_on_without_upgrade()
            except httptools.HttpParserError as error:
                self._malformed(error)
                return
        if self._framed > self.bounds.head_bytes:  # the parser keeps what is no whole field yet
            self._malformed(_HeadTooLarge())
        elif self._in_head and self._head_timer is None:
            self._await_head()

    def _feed(self, data: bytes) -> None:
        """By slices, until it is not to be read further."""
        while data and not self._read_paused and not self._deaf:
            self.data_received(data[:SLICE])
            data = data[SLICE:]
        self._rest = data

    def pause_writing(self) -> None:
        self.full = True
        self._watch_taking()

    def resume_writing(self) -> None:
        self.full = False
        if self._write_timer is not None and not self._over:
            self._write_timer.cancel()
            self._write_timer = None
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    # -- httptools -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._replayed:
            return
        self._head_size, self._in_head = 0, True

    def on_url(self, url: bytes) -> None:
        if self._replayed:
            return
        self._url += url
        self._head_size += len(url)
        if self._head_size > self.bounds.head_bytes:
            raise _HeadTooLarge

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replayed:
            return
        self._head_size += len(name) + len(value) + 4
        if self._in_head:  # else it is a trailer, which nobody here needs
            # The parser leaves the blanks behind a value, which are none of it.
            self._fields.append((name.decode("latin-1"), value.rstrip().decode("utf-8", "surrogateescape")))
        if self._head_size > self.bounds.head_bytes or len(self._fields) > MAX_FIELDS:
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
        headers, target = Headers(tuple(self._fields)), self._url.decode("latin-1")
        self._fields, self._url = [], b""
        version = parser.get_http_version()
        old = version == "1.0"
        if not old and version != "1.1":
            self._refuse(_Refusal(400, "HTTP/1.1 and 1.0 are spoken here"))
            return
        coding = headers.get("Transfer-Encoding")
        if (coding is not None or len(headers) < len(headers.pairs)) and _dubious(headers):
            self._refuse(_Refusal(400, "what this request means is not clear"))
            return
        method = parser.get_method().decode("latin-1")
        if parser.should_upgrade():
            self._upgrade_body = _framing(headers)
        request = Request(
            self,
            method,
            target,
            headers,
            old=old,
            # HTTP/1.0 knows no chunks: where its body ends is a guess, after which nothing is safe to read.
            keep=parser.should_keep_alive() and not (old and coding is not None),
            record=self._server.record(method),
        )
        self._incoming = request
        self._enqueue(request)

    def on_body(self, data: bytes) -> None:
        self._framed = 0
        if self._incoming is not None and self._incoming.feed(data) > BODY_BUFFER:
            self._pause_reading()

    def on_message_complete(self) -> None:
        self._framed = 0
        if self._upgrade_body:
            return  # the parser takes an offer of another protocol for the end
        if self._incoming is not None:
            self._incoming.end_body()
            self._incoming = None

    def _go_on_without_upgrade(self) -> None:
        """A client offers another protocol (JDK's offers HTTP/2 in each first request), which nobody need take up: the
        request is one like any other, its body follows. The parser, though, has ended. So another one reads on; where
        a body follows, it is told its framing again."""
        body, self._upgrade_body = self._upgrade_body, None
        self._parser = httptools.HttpRequestParser(self)
        if body:
            self._replayed = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + body + b"\r\n\r\n")

    # -- what is no request --------------------------------------------------------------------------------------

    def _malformed(self, error: Exception) -> None:
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
        if not isinstance(cause, httptools.HttpParserError | _HeadTooLarge):
            log.error("a request could not be read", exc_info=cause, extra={"event": "request-failed"})
        if self._incoming is not None:  # in its body: whoever reads that will say so
            self._deaf = True
            self._incoming.end_body(broken=True)
            self._incoming = None
        elif isinstance(cause, _HeadTooLarge):
            self._refuse(_Refusal(431, "the request's head is too large"))
        else:
            self._refuse(_Refusal(400, "this is not HTTP"))

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.bounds.head_s, self._head_too_slow)

    def _head_too_slow(self) -> None:
        if self._read_paused:  # it is not its client that is slow: its time begins when it is read again
            return
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
                if self._read_paused:
                    self.read_on()
                if isinstance(one, _Refusal):
                    self.write(_plain(one))
                    self._linger()
                    return
                if not await self._serve(one):
                    return
                if self.full:  # who reads no answer is not answered more
                    await self.room()
                if self._waiting:  # who asks ahead does not keep the others waiting
                    await asyncio.sleep(0)
            if self._closing:
                self._close()
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
            self._close()
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
        if replies.bodiless(request.method, reply.status):
            self.write(head)
        elif len(body) < SLICE:
            self.write(head + body)
        else:  # not copied
            self.write(head)
            self.write(body)

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
        """Unless something waits that has been read already."""
        if self._read_paused and not self._waiting and self._transport is not None:
            self._read_paused = False
            self._feed(self._rest)
            if not self._read_paused:
                self._transport.resume_reading()
                if self._in_head:
                    self._await_head()

    def _pause_reading(self) -> None:
        if not self._read_paused and self._transport is not None:
            self._read_paused = True
            self._transport.pause_reading()
            if self._look_timer is None:
                self._look_timer = self.loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """Who is not read is not heard leaving, so that is looked up."""
        self._look_timer = None
        if not self._read_paused or self._transport is None:
            return
        if _has_left(self._transport):
            self.abort()
        else:
            self._look_timer = self.loop.call_later(LOOK_S, self._look)

    @property
    def unsent(self) -> int:
        """Bytes that have been written and that not even the kernel has taken."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def _watch_taking(self) -> None:
        if self._write_timer is None and self._transport is not None and self.unsent:
            left = self.unsent + _in_kernel(self._transport)
            self._write_timer = self.loop.call_later(self.bounds.write_s, self._see_taken, left)

    def _see_taken(self, before: int) -> None:
        """A large answer may take as long as it will, if it moves."""
        self._write_timer = None
        if not self.unsent or self._transport is None:
            return
        left = self.unsent + _in_kernel(self._transport)
        if before - left < self.bounds.body_rate * self.bounds.write_s:
            self.abort()
        else:
            self._watch_taking()

    # -- ends ----------------------------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Ends our side; what the client is still sending is read and dropped for a while, because to close on it would
        be a reset, which may overtake the answer."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._end()
        self.read_on()
        try:
            transport.write_eof()
        except OSError:  # it has gone in this very moment
            self.abort()
            return
        self._watch_taking()
        self._quiet_timer = self.loop.call_later(self.bounds.linger_s, self._lingered)

    def _lingered(self) -> None:
        if self.unsent:  # and it moves, or it would be gone
            self._quiet_timer = self.loop.call_later(self.bounds.linger_s, self._lingered)
        else:
            self.abort()

    def _close(self) -> None:
        """When all has gone out, which may take a while, but not for ever."""
        if self._transport is None:
            return
        self._end()
        self._transport.close()
        self._watch_taking()

    def _end(self) -> None:
        """Nothing more is heard or said."""
        self._deaf = self._over = True
        self._waiting.clear()
        self._rest = b""
        if self._quiet_timer is not None:
            self._quiet_timer.cancel()

    def _quiet(self) -> None:
        """Looks now and then, so that no request has to start or stop a timer."""
        quiet_s = 0.0 if self._busy else self.loop.time() - self._quiet_since
        left_s = self.bounds.keepalive_s - quiet_s
        if left_s > 0.001:
            self._quiet_timer = self.loop.call_later(left_s, self._quiet)
        else:
            self.abort()  # who has not even taken its last answer by now never will

    @property
    def _busy(self) -> bool:
        return self._task is not None or self._in_head

    def close_when_idle(self) -> None:
        """No more requests: an idle connection ends now, another after its answers."""
        self._closing = True
        if not self._busy and not self._over:
            self._close()

    async def ended(self) -> None:
        """Waits until it is gone."""
        if self._transport is not None:
            self._lost = self._lost or self.loop.create_future()
            await asyncio.shield(self._lost)

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
        self._away: set[Connection] = set()
        self._closing = False

    def __call__(self) -> Connection:
        return Connection(self, asyncio.get_running_loop())

    @property
    def connections(self) -> int:
        return len(self._connections)

    def record(self, method: str) -> Record:
        return Record(self._clock, self._clock(), method, "")

    def admit(self, connection: Connection) -> str | None:
        """Why it must go, or ``None``."""
        if not self._closing and len(self._connections) < self._most:
            self._connections.add(connection)
            return None
        self.turned_away += 1
        return "the gateway is stopping" if self._closing else "too many connections"

    def may_linger(self, connection: Connection) -> bool:
        """Whether one that was turned away may stay until its refusal is seen."""
        if len(self._away) >= AWAY:
            return False
        self._away.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._away.discard(connection)

    def close_idle(self) -> None:
        """No more requests: idle connections end now, the others after their answers."""
        self._closing = True
        for connection in list(self._connections):
            connection.close_when_idle()

    async def close(self) -> None:
        """Ends whatever is left; answers that are on their way have ``linger_s`` to arrive."""
        self.close_idle()
        leaving = [connection for connection in self._connections if connection.unsent]
        tasks = [connection.cancel() for connection in (self._connections | self._away).difference(leaving)]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.bounds.linger_s):
                await asyncio.gather(*(connection.ended() for connection in leaving))
        tasks += [connection.cancel() for connection in leaving]
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next round


def _own(target: str) -> str:
    """Of a request's target what is asked of us: ``http://host/path`` is how a client would ask a proxy, and a fragment
    is its own affair."""
    if not target.startswith("/") and "://" in target:
        target = "/" + target.partition("://")[2].partition("/")[2]
    return target.partition("#")[0] if "#" in target else target


def _path(target: str) -> str:
    path = target.partition("?")[0] if "?" in target else target
    return unquote(path) if "%" in path else path


def _dubious(headers: Headers) -> bool:
    """Whether another who reads this head could take it for something else (RFC 9112 sections 3.2 and 6.3)."""
    codings = [value.lower() for name, value in headers.pairs if name.lower() == "transfer-encoding"]
    hosts = sum(name.lower() == "host" for name, _ in headers.pairs)
    return codings not in ([], ["chunked"]) or hosts > 1


def _framing(headers: Headers) -> bytes | None:
    """The line of the head that says how long the body is, if there is one."""
    if headers.get("Transfer-Encoding") is not None:
        return b"Transfer-Encoding: chunked"
    length = headers.get("Content-Length")
    return None if length is None else b"Content-Length: " + length.encode()


def _has_left(transport: asyncio.Transport) -> bool:
    """Whether the client has ended its side, though not all that it sent has been read."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _LEFT)
    return bool(poll.poll(0))


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes on their way that the client has not taken. It may be megabytes, a third of which has to go before the
    kernel takes more: without them a slow client would look like one that stands still. 0 where they are not told."""
    try:
        told = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(told, sys.byteorder)


async def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """Raises BadRequest; ``limit`` is of what comes out: a few bytes can become gigabytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BadRequest("the body's Content-Encoding is none of gzip, deflate", status=415)
    # RFC 9110 section 8.4.1.2: "deflate" has zlib's wrapping, which some clients leave out.
    raw = encoding == "deflate" and (len(body) < 2 or body[0] & 15 != 8 or int.from_bytes(body[:2], "big") % 31)
    unpack = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    plain = bytearray()
    for start in range(0, len(body), UNPACK):  # what is not taken of a piece is copied each time, so it is no large one
        rest = body[start : start + UNPACK]
        more = True
        while more:
            try:
                piece = unpack.decompress(rest, UNPACK)
            except zlib.error:
                raise BadRequest("the request body is not what its head says") from None
            plain += piece
            if len(plain) > limit:
                raise _too_large()
            rest = unpack.unconsumed_tail
            more = not unpack.eof and (len(rest) > 0 or len(piece) == UNPACK)
            if more or len(body) > UNPACK:
                await asyncio.sleep(0)
    if not unpack.eof or unpack.unused_data:
        raise BadRequest("the request body is not what its head says")
    return bytes(plain)


def _id(given: str | None) -> str | None:
    """What a client calls its request: a short word that is safe in a header and in a log, or nothing."""
    if not given or not given.isascii() or not given.isprintable():
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
