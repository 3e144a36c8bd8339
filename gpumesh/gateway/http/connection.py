"""One client's HTTP/1.1 connection: an ``asyncio.Protocol`` around httptools (llhttp, as Node.js and uvicorn have it).

Our own, because each token passes here (`benchmarks/gateway.py`), and because in front of hardware that costs money
everything that a client can hold needs a bound. It could hold a connection, a handler or a node's place for ever: by a
head that never gets complete (slow loris), by a body that hardly moves, by not reading its answer, by asking ahead
without end, or by opening more connections than the process may have files. Each of these has its bound, and each
refusal is an answer that says so, without a byte of what the client sent.

A connection has one task while it has requests, which serves them in their order. Its client leaving cancels it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import select
import sys
import termios
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import httptools

from gpumesh.gateway import error_shapes
from gpumesh.gateway.http import responses
from gpumesh.gateway.http.admission import UNIX_CLIENT
from gpumesh.gateway.http.exchange import Request
from gpumesh.gateway.http.responses import Headers, Response, json_response
from gpumesh.gateway.model_requests import ClientApi
from gpumesh.mesh.requests.slice_queue import MAX_SMALL_PIECES, SLICE_BYTES

if TYPE_CHECKING:
    from gpumesh.gateway.http.server import Server

log = logging.getLogger(__name__)

MAX_FIELDS = 128  # of a head
AHEAD = 16  # requests that a client may have sent before the first is answered, until it is no longer read
MAX_BUFFERED_BODY_BYTES = 256 << 10  # bytes of bodies that wait for their handlers, until the client is no longer read
HEADS = 2 << 10  # bytes outside of a body that are parsed at a time: they may be forty requests
COPIED = 32 << 10  # bytes of a body up to which it is sent in one piece with its head
LOOK_S = 0.05  # between two looks whether a client that is not read has left
_LEFT = getattr(select, "POLLRDHUP", 0)  # POLLHUP and POLLERR, which everybody has, are told in any case


class _HeadTooLarge(Exception):
    """Raised through the parser."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to what is no request, in its turn. After it the connection ends."""

    status: int
    message: str


class ClientConnection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.bounds = server.bounds
        self.memory = server.memory
        self.work_runner = server.work_runner
        self.backpressured = False
        self.client_address: str | None = None
        self.on_writable: Callable[[], None] | None = None
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        # The message that is being read.
        self._url = b""
        self._fields: list[tuple[str, str]] = []
        self._head_size = 0
        self._in_head = False
        self._framed = 0  # bytes that are no body's, since the last that was or the end of a message
        self._pieces: list[bytes] = []  # of a body, until what was read is parsed
        self._piece_count = 0
        self._rest = b""  # of what was read, while it is not to be parsed
        self._queued = False  # for the next slice of it
        self._incoming: Request | None = None
        self._upgrade_body: bytes | None = None
        self._replayed = False
        # Those that have been read.
        self._waiting: deque[Request | Refusal] = deque()
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
        peer = transport.get_extra_info("peername")
        # A client of the Unix socket has no address: asyncio says "", where it does not know one None.
        self.client_address = peer[0] if isinstance(peer, tuple) else None if peer is None else UNIX_CLIENT
        why_not = self._server.admit(self)
        if why_not is not None:
            self.write(_plain(Refusal(503, why_not), ("Retry-After", "1")))
            if self._server.may_linger(self):
                self._linger()
            else:
                self._close()
            return
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
        if self.on_writable is not None:
            self.on_writable()
        if self._lost is not None:
            self._lost.set_result(None)
        if self._incoming is not None:
            self._incoming.end_body(broken=True)
        if self._task is not None:
            self._task.cancel()
        # So that nothing of it has to wait for the garbage collector.
        self._incoming, self._rest = None, b""
        self._forget_waiting()
        self._pieces.clear()
        del self._parser

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if len(data) > HEADS or self._rest:
            self._rest += data
            if not self._read_paused:
                self._parse_rest()
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
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
        if self._pieces:
            self._hand_over()
        if self._framed > self.bounds.max_head_bytes:  # the parser keeps what is no whole field yet
            self._malformed(_HeadTooLarge())
        elif self._in_head and self._head_timer is None:
            self._await_head()

    def _parse_rest(self) -> None:
        """By slices, until it is not to be read further. After one of many small pieces, which cost more than their
        bytes, others have their turn."""
        rest, at = self._rest, 0
        while at < len(rest) and not self._read_paused and not self._deaf:
            self._piece_count = 0
            size = HEADS if self._incoming is None else SLICE_BYTES
            self._parse(rest[at : at + size])
            at += size
            if self._piece_count > MAX_SMALL_PIECES and not self._deaf:
                self._queued = True
                self._pause_reading()
                self._server.slices.add(self._parse_next)
        self._rest = b"" if self._deaf else rest[at:]

    def _parse_next(self) -> None:
        """Its turn has come; a handler that has more of the body than it takes reads on by itself."""
        if self._queued:
            self._queued = False
            if self._incoming is None or self._incoming.buffered <= MAX_BUFFERED_BODY_BYTES:
                self.continue_reading()

    def pause_writing(self) -> None:
        self.backpressured = True
        self._watch_taking()

    def resume_writing(self) -> None:
        self.backpressured = False
        if self._write_timer is not None and not self._over:
            self._write_timer.cancel()
            self._write_timer = None
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if self.on_writable is not None:
            self.on_writable()

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
        if self._head_size > self.bounds.max_head_bytes:
            raise _HeadTooLarge

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replayed:
            return
        self._head_size += len(name) + len(value) + 4
        if self._in_head:  # else it is a trailer, which nobody here needs
            # The parser leaves the blanks behind a value, which are none of it.
            self._fields.append((name.decode("latin-1"), value.rstrip().decode("utf-8", "surrogateescape")))
        if self._head_size > self.bounds.max_head_bytes or len(self._fields) > MAX_FIELDS:
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
            self._refuse(Refusal(400, "HTTP/1.1 and 1.0 are spoken here"))
            return
        coding = headers.get("Transfer-Encoding")
        if (coding is not None or len(headers) < len(headers.pairs)) and _dubious(headers):
            self._refuse(Refusal(400, "what this request means is not clear"))
            return
        method = parser.get_method().decode("latin-1")
        if parser.should_upgrade():
            self._upgrade_body = _framing(headers)
        request = Request(
            self,
            method,
            target,
            headers,
            is_http10=old,
            # HTTP/1.0 knows no chunks: where its body ends is a guess, after which nothing is safe to read.
            keep_alive=parser.should_keep_alive() and not (old and coding is not None),
            record=self._server.start_record(method),
        )
        self._incoming = request
        self._enqueue(request)

    def on_body(self, data: bytes) -> None:
        self._framed = 0
        self._pieces.append(data)

    def _hand_over(self) -> None:
        """To the handler, in one piece: thousands of small ones would each cost memory of their own."""
        pieces = self._pieces
        self._piece_count += len(pieces)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._incoming is None:
            return
        size = self._incoming.feed(data)
        if len(self._waiting) > 1:  # asked ahead: of all of them
            size = sum(one.buffered for one in self._waiting if isinstance(one, Request))
        if size > MAX_BUFFERED_BODY_BYTES:
            self._pause_reading()

    def on_message_complete(self) -> None:
        self._framed = 0
        if self._pieces:
            self._hand_over()
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
            self._refuse(Refusal(431, "the request's head is too large"))
        else:
            self._refuse(Refusal(400, "this is not HTTP"))

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.bounds.head_timeout_s, self._head_too_slow)

    def _head_too_slow(self) -> None:
        if self._read_paused:  # it is not its client that is slow: its time begins when it is read again
            return
        self._refuse(Refusal(408, "the request's head came too slowly"))

    def _refuse(self, refusal: Refusal) -> None:
        if not self._deaf:
            self._deaf = True
            self._enqueue(refusal)

    # -- serving -------------------------------------------------------------------------------------------------

    def _enqueue(self, one: Request | Refusal) -> None:
        self._waiting.append(one)
        if self._task is None:
            self._task = self.loop.create_task(self._work())
            self._server.admission.mark_busy(self)
        elif len(self._waiting) > AHEAD:
            self._pause_reading()

    async def _work(self) -> None:
        try:
            while self._waiting and self._transport is not None:
                one = self._waiting.popleft()
                if self._read_paused:
                    self.continue_reading()
                if isinstance(one, Refusal):
                    self.write(_plain(one))
                    self._linger()
                    return
                if not await self._serve(one):
                    return
                if self.backpressured:  # who reads no answer is not answered more
                    await self.wait_writable()
                if self._read_paused:  # a handler may have answered without the body that filled the room
                    self.continue_reading()
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
            self._server.admission.mark_idle(self)

    async def _serve(self, request: Request) -> bool:
        """Whether the connection goes on after it. Raises ConnectionError."""
        try:
            reply = await self._server.handler(request)
        except (ConnectionError, asyncio.CancelledError) as error:
            # Its frames hold the request, whose body would wait for the garbage collector: some of them know this task,
            # which holds it.
            error.__traceback__ = None
            raise
        except Exception as error:  # a bug: it must cost one client an error and not all of them the server
            log.error("a request failed", exc_info=error, extra={"event": "request-failed"})  # noqa: TRY400
            reply = json_response(_error(500, "the gateway failed inside"), status=500, close=True)
        finally:
            request.release()
            self.on_writable = None
        if isinstance(reply, Response):
            if request.answer_started:
                raise ConnectionError("a part of another answer has been sent already")
            self._send(request, reply)
        elif not reply.finished:
            raise ConnectionError("the answer was not ended")
        if self._transport is None:
            return False
        if not request.body_received:
            self._linger()
            return False
        if not self.keeps_alive(request):
            self._close()
            return False
        return True

    def _send(self, request: Request, reply: Response) -> None:
        if reply.close:
            request.keep_alive = False
        body = reply.body
        head = responses.render_head(
            reply.status,
            request.answer_headers(reply.headers),
            length=len(body),
            keep_alive=self.keeps_alive(request),
            is_http10=request.is_http10,
            content_security_policy=reply.content_security_policy,
        )
        request.answer_started = True
        if responses.has_no_body(request.method, reply.status):
            self.write(head)
        elif len(body) < COPIED:
            self.write(head + body)
        else:  # not copied
            self.write(head)
            self.write(body)

    def keeps_alive(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""
        return request.keep_alive and not self._closing and request.body_received

    def write(self, data: bytes) -> None:
        """Raises ConnectionResetError when the client is gone."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if data:
            self._transport.write(data)

    async def wait_writable(self) -> None:
        if self.backpressured:
            if self._transport is None:
                raise ConnectionResetError("the client is gone")
            self._room = self.loop.create_future()
            try:
                await self._room
            finally:
                self._room = None

    def continue_reading(self) -> None:
        """Unless something waits that has been read already."""
        if self._read_paused and not self._queued and not self._waiting and self._transport is not None:
            self._read_paused = False
            self._parse_rest()
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
    def unsent_bytes(self) -> int:
        """Bytes that have been written and that not even the kernel has taken."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def unacknowledged_bytes(self) -> int | None:
        if self._transport is None:
            return 0
        in_kernel = _in_kernel(self._transport)
        return None if in_kernel is None else self.unsent_bytes + in_kernel

    def _watch_taking(self) -> None:
        if self._write_timer is None and self._transport is not None and self.unsent_bytes:
            left = self.unsent_bytes + (_in_kernel(self._transport) or 0)
            self._write_timer = self.loop.call_later(self.bounds.write_timeout_s, self._see_taken, left)

    def _see_taken(self, before: int) -> None:
        """A large answer may take as long as it will, if it moves."""
        self._write_timer = None
        if not self.unsent_bytes or self._transport is None:
            return
        left = self.unsent_bytes + (_in_kernel(self._transport) or 0)
        if before - left < self.bounds.min_bytes_per_s * self.bounds.write_timeout_s:
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
        self._queued = False
        self.continue_reading()
        try:
            transport.write_eof()
        except OSError:  # it has gone in this very moment
            self.abort()
            return
        self._watch_taking()
        self._quiet_timer = self.loop.call_later(self.bounds.linger_s, self._lingered)

    def _lingered(self) -> None:
        if self.unsent_bytes:  # and it moves, or it would be gone
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
        self._forget_waiting()
        self._rest = b""
        if self._quiet_timer is not None:
            self._quiet_timer.cancel()

    def _forget_waiting(self) -> None:
        for request in self._waiting:
            if isinstance(request, Request):
                request.release()
        self._waiting.clear()

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

    def register_key(self, key: str | None) -> str | None:
        """A request of it is accepted; or why it must be refused."""
        return self._server.register_key(self, key)

    def evict(self) -> None:
        """It is idle, and its place is another's now."""
        if self._over or self.unsent_bytes:
            self.abort()  # it would stay until its client has taken the rest
        else:
            self._close()

    def close_when_idle(self) -> None:
        """No more requests: an idle connection ends now, another after its answers."""
        self._closing = True
        if not self._busy and not self._over:
            self._close()

    async def wait_closed(self) -> None:
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


def _in_kernel(transport: asyncio.Transport) -> int | None:
    """Bytes on their way that the client has not taken. It may be megabytes, a third of which has to go before the
    kernel takes more: without them a slow client would look like one that stands still. ``None`` where they are not
    told."""
    try:
        told = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return None
    return int.from_bytes(told, sys.byteorder)


def _error(status: int, words: str) -> bytes:
    """Whose dialect it would be is not known where there is no path: Ollama's."""
    return error_shapes.error_body(ClientApi.OLLAMA, status, words)


def _plain(refusal: Refusal, *more: tuple[str, str]) -> bytes:
    """An answer outside of any request."""
    body = _error(refusal.status, refusal.message)
    headers = (("Content-Type", "application/json"), *more)
    return responses.render_head(refusal.status, headers, length=len(body), keep_alive=False, is_http10=False) + body
