"""The HTTP client of the hot path: one request to one backend, its answer as it comes. httpx serves the probes.

On an ``asyncio.Protocol`` and httptools (llhttp, the parser of Node.js and uvicorn), because each token passes here:
`benchmarks/gateway.py` has what a general client costs in its place. It does what a backend needs and no more: one
request at a time on a keep-alive connection, TLS, no redirects, cookies, proxies or decompression.

What a server sends is bounded before it is parsed. llhttp hands a field over in pieces, and its wrapper joins them
anew with each piece: so the bytes are counted that are read before a field is whole. And a server can put thousands of
chunks into one read: such a read is parsed by slices, one in each turn of the event loop (slice_queue.py).

Errors are translated here, once: BackendUnreachable before the answer's head, StreamCut inside its body.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self, cast
from urllib.parse import urlsplit

import httptools

from gpumesh.backends.answer_head import read_head
from gpumesh.backends.base import HttpCall
from gpumesh.errors import BackendUnreachable, StreamCut
from gpumesh.slice_queue import MAX_SMALL_PIECES, SLICE_BYTES, SliceQueue
from gpumesh.tunnels.local_system.unix_urls import split_unix_url

CONNECT_TIMEOUT_S = 3.0
KEEPALIVE_S = 30.0
READ_BUFFER = 1 << 16  # bytes held for a reader that is slow; past it the backend is no longer read
READ_PIECES = 1 << 12  # so many, too, however small they are: each costs memory of its own
HEAD_BYTES = 1 << 16  # of a head, of trailers, and of all that comes between two pieces of a body
MAX_FIELDS = 256  # of a head
JOINED_BYTES = 1 << 16  # a body up to this is sent together with its head


class _Address(NamedTuple):
    host: str
    port: int
    tls: bool
    server_name: str | None
    socket: str | None


class _Exchange:
    """One request on one connection, and what has come of its answer.

    ``head`` is done when the answer's head is there, or with the exception that ended it before. ``problem`` says why
    the body will not be whole.
    """

    __slots__ = ("complete", "head", "headers", "keep", "length", "pieces", "problem", "size", "status", "waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.head: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.length: int | None = None
        self.pieces: list[bytes] = []
        self.size = 0
        self.complete = False
        self.keep = False
        self.problem: str | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection to a backend; ``exchange`` is the one under way, ``None`` while it waits in the pool."""

    def __init__(self, pool: _Pool) -> None:
        self.exchange: _Exchange | None = None
        self.used = 0
        self.idle_since = 0.0
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._bodiless = False
        self._until_eof = False
        self._head_size = 0
        self._unframed = 0  # bytes parsed since the last piece of a body
        self._paused = False
        self._rest = b""  # of what was read and is not parsed yet
        self._queued = False

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, method: str, head: bytes, body: bytes) -> _Exchange:
        assert self._transport is not None
        self.used += 1
        self._bodiless = method == "HEAD"
        self._until_eof = False
        self._head_size = self._unframed = 0
        self.exchange = exchange = _Exchange(self._loop)
        if len(body) < JOINED_BYTES:
            self._transport.write(head + body)  # one packet, if it is short
        else:  # not copied
            self._transport.write(head)
            self._transport.write(body)
        return exchange

    def resume(self) -> None:
        """The reader has taken what there was."""
        if self._rest:
            if not self._queued:
                self._parse_rest()
        elif self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        self._rest = b""
        if self._transport is not None:
            self._transport.abort()
        self._fail("it was given up")

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None or exchange.complete:
            self.abort()  # bytes that nobody asked for: what comes next on this connection cannot be trusted
        elif len(data) > SLICE_BYTES or self._rest:
            self._rest += data
            if not self._queued:
                self._parse_rest()
        else:
            self._parse(exchange, data)
            if exchange.size > READ_BUFFER or len(exchange.pieces) > READ_PIECES:
                self._pause()

    def _parse(self, exchange: _Exchange, data: bytes) -> None:
        size = exchange.size
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if exchange.complete:  # a HEAD's answer, or trailing rubbish: the answer itself is whole
                exchange.keep = False
            else:
                self._fail(f"what it says is not HTTP ({error.__context__ or error})", abort=True)
        if exchange.size != size:
            self._unframed = 0
        else:
            self._unframed += len(data)
            if self._unframed > HEAD_BYTES and not exchange.complete:
                self._fail(f"more than {HEAD_BYTES >> 10} KiB of its answer are no body", abort=True)
        if exchange.pieces or exchange.complete:
            exchange.wake()
        if exchange.complete and not exchange.keep and self._transport is not None:
            self._transport.abort()

    def _parse_rest(self) -> None:
        """By slices. After one of many small pieces, which cost more than their bytes, others have their turn."""
        self._queued = False
        rest, at = self._rest, 0
        exchange = self.exchange
        while at < len(rest) and exchange is not None and exchange.size <= READ_BUFFER:
            before = len(exchange.pieces)
            self._parse(exchange, rest[at : at + SLICE_BYTES])
            at += SLICE_BYTES
            if exchange.problem is not None or (exchange.complete and at < len(rest)):
                exchange.keep = False  # what follows an answer spoils the connection and not the answer
                self._rest = b""
                if self._transport is not None:
                    self._transport.abort()
                return
            if len(exchange.pieces) - before > MAX_SMALL_PIECES:
                exchange.pieces[before:] = [b"".join(exchange.pieces[before:])]
                self._queued = True
                self._pool.slices.add(self._parse_rest)
                break
        self._rest = rest[at:]
        if self._queued or self._rest or (exchange is not None and exchange.size > READ_BUFFER):
            self._pause()
        else:
            self.resume()

    def _pause(self) -> None:
        if not self._paused and self.open:
            self._paused = True
            assert self._transport is not None
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.lost(self)
        exchange = self.exchange
        if exchange is None or exchange.complete:
            return
        if self._rest and error is None:  # TLS may end a connection in the moment in which it gives the last of it
            rest, self._rest = self._rest, b""
            self._parse(exchange, rest)
        if exchange.complete:
            return
        if self._until_eof and error is None and exchange.problem is None:
            exchange.complete = True
            exchange.wake()
        else:
            self._fail(_words(error) if error is not None else "the server closed the connection")

    # -- httptools ---------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.exchange is not None and self.exchange.complete:
            self.exchange.keep = False  # another answer, to no question: the first stands, the connection goes

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > HEAD_BYTES:
            raise httptools.HttpParserError(f"a head of more than {HEAD_BYTES >> 10} KiB")
        if self.exchange is not None and not self.exchange.status:
            self.exchange.headers.append((name, value))
            if len(self.exchange.headers) > MAX_FIELDS:
                raise httptools.HttpParserError(f"a head of more than {MAX_FIELDS} fields")

    def on_headers_complete(self) -> None:
        exchange = self.exchange
        if exchange is None or exchange.status:
            return
        status = self._parser.get_status_code()
        if status < 200:  # "100 Continue" and its kin announce the true answer
            exchange.headers.clear()
            return
        exchange.status = status
        chunked = False
        for name, value in exchange.headers:
            lower = name.lower()
            if lower == b"content-length":
                exchange.length = int(value) if value.isdigit() else None
            elif lower == b"transfer-encoding":
                chunked = True
        self._until_eof = not chunked and exchange.length is None and status not in (204, 304)
        if self._bodiless:
            # The parser cannot be told that no body follows: the answer ends here, and so does the connection.
            exchange.complete = True
        if not exchange.head.done():
            exchange.head.set_result(None)

    def on_body(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is not None and not exchange.complete:
            exchange.pieces.append(data)
            exchange.size += len(data)

    def on_message_complete(self) -> None:
        exchange = self.exchange
        if exchange is not None and exchange.status and not exchange.complete:
            exchange.complete = True
            exchange.keep = self._parser.should_keep_alive() and not self._until_eof

    def _fail(self, problem: str, *, abort: bool = False) -> None:
        if abort and self._transport is not None:
            self._transport.abort()
        exchange = self.exchange
        if exchange is None or exchange.complete or exchange.problem is not None:
            return
        exchange.problem = problem
        if not exchange.head.done():
            exchange.head.set_exception(ConnectionResetError(problem))
            exchange.head.exception()  # seen: whoever gave up waiting must not be told at garbage collection
        exchange.wake()


class UpstreamResponse:
    """One answer. Read it to the end or ``abort`` it: a connection goes back to the pool only when it is clean.

    ``headers`` are those that a client may see; ``problem`` says why this is no answer of an inference server.
    """

    __slots__ = (
        "_connection",
        "_exchange",
        "_node",
        "_pool",
        "content_length",
        "content_type",
        "headers",
        "problem",
        "status",
    )

    def __init__(self, connection: _Connection, exchange: _Exchange, pool: _Pool, node: str) -> None:
        self._connection: _Connection | None = connection
        self._exchange = exchange
        self._pool = pool
        self._node = node
        self.status = exchange.status
        self.content_length = exchange.length
        empty = exchange.length == 0 or exchange.status == 204
        self.content_type, self.headers, self.problem = read_head(exchange.status, exchange.headers, empty=empty)
        if exchange.complete and not exchange.pieces:
            self._give_back()

    async def read(self) -> bytes:
        """The next piece as it came; empty at the end. Raises StreamCut when the body stops short."""
        exchange = self._exchange
        while not exchange.pieces:
            if exchange.complete:
                return b""
            if exchange.problem is not None:
                raise StreamCut(f"the answer stopped short: {exchange.problem}", node=self._node)
            exchange.waiter = asyncio.get_running_loop().create_future()
            try:
                await exchange.waiter
            finally:
                exchange.waiter = None
        data = exchange.pieces[0] if len(exchange.pieces) == 1 else b"".join(exchange.pieces)
        exchange.pieces.clear()
        exchange.size = 0
        if exchange.complete:
            self._give_back()
        elif self._connection is not None:
            self._connection.resume()
        return data

    async def wait_turn(self) -> None:
        """For who has much to look at: returns when others have had their turn, and one after the other for all
        answers."""
        await self._pool.slices.wait_turn()

    def abort(self) -> None:
        """Closes the connection, so that the server stops working on it. Harmless after the end."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.abort()

    def _give_back(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            self._pool.give_back(connection)


class _Pool:
    """Idle connections by address, the most lately used first: it is the least likely to have gone stale."""

    def __init__(self) -> None:
        self.slices = SliceQueue()
        self._idle: dict[_Address, list[_Connection]] = {}
        self._address: dict[_Connection, _Address] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, address: _Address, *, new: bool = False) -> _Connection:
        """``new``: not one that was used before. Raises OSError and TimeoutError."""
        idle = None if new else self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        tls: dict[str, Any] = {
            "ssl": _tls() if address.tls else None,
            "server_hostname": (address.server_name or address.host) if address.tls else None,
        }
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if address.socket is not None:
                _, connection = await loop.create_unix_connection(lambda: _Connection(self), address.socket, **tls)
            else:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), address.host, address.port, **tls
                )
        self._address[connection] = address
        return connection

    def give_back(self, connection: _Connection) -> None:
        exchange, connection.exchange = connection.exchange, None
        address = self._address.get(connection)
        if exchange is None or not exchange.keep or not connection.open or address is None:
            connection.abort()
            return
        connection.resume()  # what closes it must be seen while it waits
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(address, []).append(connection)
        if self._timer is None:
            self._timer = loop.call_later(KEEPALIVE_S, self._expire)

    def lost(self, connection: _Connection) -> None:
        address = self._address.pop(connection, None)
        if address is not None and connection in (idle := self._idle.get(address, [])):
            idle.remove(connection)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() - KEEPALIVE_S
        for connection in [one for idle in self._idle.values() for one in idle if one.idle_since <= until]:
            connection.abort()
        waiting = any(self._idle.values())
        self._timer = loop.call_later(KEEPALIVE_S, self._expire) if waiting else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._address):
            connection.abort()


class Upstream:
    """A pool of keep-alive connections to all backends. Use as an async context manager."""

    def __init__(self) -> None:
        self._pool = _Pool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pool.close()
        await asyncio.sleep(0)  # the transports close in the loop's next round

    async def request(
        self,
        base_url: str,
        call: HttpCall,
        headers: Sequence[tuple[str, str]],
        *,
        node: str,
        server_name: str | None,
        at_most_once: bool = False,
    ) -> UpstreamResponse:
        """Sends and waits for the answer's head. Cancelling it closes the connection.

        A kept-alive connection that the server closed meanwhile is not the server's failure: such a request is sent
        again on another (nothing of it can have been answered, and inference has no side effects). What may be sent
        only ``at_most_once`` goes over a new connection, where that cannot happen.
        Raises BackendUnreachable.
        """
        host, port, tls, prefix, socket = _place(base_url)
        address = _Address(host, port, tls, server_name if tls else None, socket)
        head = _head(call, prefix, headers, f"{host}:{port}" if socket is None else host)
        while True:
            try:
                connection = await self._pool.take(address, new=at_most_once)
            except TimeoutError as error:
                raise BackendUnreachable(f"no connection within {CONNECT_TIMEOUT_S:g} s", node=node) from error
            except OSError as error:
                raise BackendUnreachable(f"no connection: {_words(error)}", node=node) from error
            exchange = connection.begin(call.method, head, call.body)
            try:
                await exchange.head
            except ConnectionResetError as error:
                if connection.used > 1 and not exchange.headers:
                    continue
                # Without its frames: they hold the request's body, and what they hold holds it.
                raise BackendUnreachable(f"no answer: {error}", node=node, request_sent=True) from error.with_traceback(
                    None
                )
            except BaseException:
                connection.abort()
                raise
            return UpstreamResponse(connection, exchange, self._pool, node)


def _head(call: HttpCall, prefix: str, headers: Sequence[tuple[str, str]], host: str) -> bytes:
    """The request's head as it goes on the wire. Raises ValueError for what would end a line of the head."""
    lines = [f"{call.method} {prefix}{call.path} HTTP/1.1", "Accept-Encoding: identity"]
    named = False
    for name, value in headers:
        named = named or name.lower() == "host"
        lines.append(f"{name}: {value}")
    if not named:
        lines.append(f"Host: {host}")
    if call.body or call.method not in ("GET", "HEAD"):
        lines.append(f"Content-Length: {len(call.body)}")
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ValueError("a line end inside of a header")
    return head.encode("utf-8", "surrogateescape") + b"\r\n\r\n"


@lru_cache(maxsize=1024)
def _place(base_url: str) -> tuple[str, int, bool, str, str | None]:
    """Host, port, whether by TLS, the path before each call's, and the Unix socket in place of host and port."""
    parts = urlsplit(base_url)
    tls = parts.scheme == "https"
    unix = split_unix_url(base_url)
    if unix is not None:
        return "localhost", 0, tls, unix[1].rstrip("/"), unix[0]
    return parts.hostname or "127.0.0.1", parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"), None


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _words(error: BaseException) -> str:
    """An exception as a person would say it; some have no text at all."""
    said: Any = getattr(error, "strerror", None) or str(error)
    return str(said) or type(error).__name__
