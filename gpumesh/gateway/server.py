"""The gateway's HTTP server: aiohttp's, with the bounds that aiohttp leaves open.

aiohttp bounds the sizes of a head. A client can still hold a connection, a handler or a node's place for ever: by a
head that never gets complete (slow loris), by a body that hardly moves, by not reading its answer, or by opening more
connections than the process may have files. Each of these has its bound here, and each refusal is an answer that says
so, without a byte of what the client sent. Where aiohttp has no hook for it, its connection is subclassed; the private
names that this takes are in ``Connection`` and ``Request`` only, and the tests use real sockets.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, http_exceptions, web

from gpumesh.gateway.record import Record
from gpumesh.gateway.requests import BadRequest

log = logging.getLogger(__name__)

RESERVED_FILES = 256  # of the process's open files: tunnels, probes, log, sockets of other commands
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_ID = 128  # of a client's X-Request-Id

_VERSIONS = (HttpVersion10, HttpVersion11)
_MALFORMED = (web.RequestPayloadError, http_exceptions.HttpProcessingError)

Handler = Callable[["Request"], Awaitable[web.StreamResponse]]


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


class Request(web.BaseRequest):
    """A request, its record, and what its answer's head must say on its account. ``spoken``: its version of HTTP is
    one that is spoken here (the parser takes 0.9 and others for versions too)."""

    ATTRS = web.BaseRequest.ATTRS | frozenset({"bounds", "cors", "id", "record", "spoken"})

    def __init__(
        self,
        message: Any,
        payload: Any,
        protocol: Any,
        writer: Any,
        task: asyncio.Task[None],
        loop: asyncio.AbstractEventLoop,
        bounds: Bounds,
        record: Record,
    ) -> None:
        self.spoken = message.version in _VERSIONS
        if not self.spoken:
            # The answer's first line would repeat it.
            message = message._replace(version=HttpVersion10, should_close=True)
        super().__init__(message, payload, protocol, writer, task, loop, client_max_size=bounds.body_bytes)
        self.bounds = bounds
        self.record = record
        self.cors: dict[str, str] | None = None
        self.id = _id(message.headers.get("X-Request-Id"))

    async def body(self) -> bytes:
        """The whole body, unpacked. Raises BadRequest: too large, too slow, not as its head says."""
        length = self.content_length
        if length is not None and length > self.bounds.body_bytes:
            raise _too_large()
        try:
            if self.content.is_eof():  # by far the most common: it came together with the head
                return await self.read()
            pieces = bytearray()
            async for piece in self.pieces():
                pieces += piece
                if len(pieces) > self.bounds.body_bytes:
                    raise _too_large()
            return bytes(pieces)
        except web.HTTPRequestEntityTooLarge:
            raise _too_large() from None
        except _MALFORMED:
            raise _malformed() from None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any length. Raises BadRequest: too slow, not as its head says."""
        self._go_on()
        bounds, began, size = self.bounds, self._loop.time(), 0
        while True:
            try:
                async with asyncio.timeout_at(began + bounds.body_s + size / bounds.body_rate):
                    piece = await self.content.readany()
            except TimeoutError:
                raise BadRequest("the request body came too slowly", status=408) from None
            except _MALFORMED:
                raise _malformed() from None
            if not piece:
                return
            size += len(piece)
            yield piece

    def _go_on(self) -> None:
        """curl and others ask before they send something large, and wait a second if nobody answers."""
        expect = self.headers.get("Expect")
        if expect is None:
            return
        if expect.strip().lower() != "100-continue":
            raise BadRequest("this expectation cannot be met", status=417)
        if self.transport is not None and self.version >= (1, 1):
            self.transport.write(CONTINUE)

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        headers = response.headers
        headers["Server"] = "gpumesh"
        if self.cors is not None:
            headers.update(self.cors)
        if self.id is not None:
            headers["X-Request-Id"] = self.id


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_bounds", "_head_timer", "_write_timer")

    def __init__(self, manager: Server, *, loop: asyncio.AbstractEventLoop, bounds: Bounds) -> None:
        super().__init__(
            manager,
            loop=loop,
            logger=log,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own for "none"
            keepalive_timeout=bounds.keepalive_s,
            max_line_size=bounds.head_bytes,
            max_field_size=bounds.head_bytes,
            lingering_time=bounds.linger_s,
        )
        self._bounds = bounds
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        manager = self._manager
        assert isinstance(manager, Server)
        if manager.full:
            manager.turned_away += 1
            refused = cast("asyncio.Transport", transport)  # uvloop's are none by their class
            refused.write(_plain(503, "too many connections", "Retry-After: 1\r\n"))
            refused.close()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiter = self._waiter
        # The first bytes may come before the task that waits for a request has begun to wait.
        waits = not self._request_count or (waiter is not None and not waiter.done())
        if not waits:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            # Bytes came, and no request yet: a head has begun.
            self._head_timer = self._loop.call_later(self._bounds.head_s, self._head_too_slow)

    def _head_too_slow(self) -> None:
        if self.transport is not None:
            self.transport.write(_plain(408, "the request's head came too slowly"))
        self.force_close()

    def _process_keepalive(self) -> None:
        if self._head_timer is not None:
            self._keepalive_handle = None  # no longer idle; the head has a time of its own
            return
        super()._process_keepalive()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._loop.call_later(self._bounds.write_s, self._reader_stopped)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _reader_stopped(self) -> None:
        """The buffer did not get empty in all that time. The handler is cancelled with the connection."""
        if self.transport is not None:
            self.transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP request at all, and what no handler answered. Nothing of the request is repeated."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of an answer has been sent already")
        if status == 400:
            too_long = isinstance(exc, http_exceptions.LineTooLong)
            status, words = (431, "the request's head is too large") if too_long else (400, "this is not HTTP")
            log.debug("a malformed request: %s", type(exc).__name__)
        else:
            words = "the gateway failed inside"
            log.error("a request failed: %s", message or status, exc_info=exc, extra={"event": "request-failed"})
        response = web.Response(body=_error(words), status=status, content_type="application/json")
        response.force_close()
        return response


class Server(web.Server):
    """Accepts connections for one handler. ``turned_away`` counts those past the bound."""

    def __init__(self, handler: Handler, bounds: Bounds, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(handler, request_factory=self._new_request, handler_cancellation=True)  # type: ignore[arg-type]
        self.bounds = bounds
        self.turned_away = 0
        self._clock = clock
        self._most = connections_allowed() if bounds.connections is None else bounds.connections

    @property
    def full(self) -> bool:
        return len(self._connections) >= self._most

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, bounds=self.bounds)

    def _new_request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: asyncio.Task[None]
    ) -> web.BaseRequest:
        clock = self._clock
        record = Record(clock, clock(), message.method, "")
        return Request(message, payload, protocol, writer, task, self._loop, self.bounds, record)


def _id(given: str | None) -> str | None:
    """What a client calls its request: a short word that is safe in a header and in a log, or nothing."""
    if given is None or not given.isascii() or not given.isprintable():
        return None
    return given[:MAX_ID]


def _malformed() -> BadRequest:
    return BadRequest("the request body is not what its head says")


def _too_large() -> BadRequest:
    return BadRequest("the request body is too large", status=413)


def _error(words: str) -> bytes:
    """Whose dialect it would be is not known where there is no path: Ollama's."""
    return json.dumps({"error": words}).encode()


def _plain(status: int, words: str, more: str = "") -> bytes:
    """An answer outside of any request."""
    body = _error(words)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nServer: gpumesh\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode() + body
