"""A connection to a backend: an ``asyncio.Protocol`` that pushes each response's body into a sink as it is parsed.

A server can put thousands of chunks into one read. Such a read is parsed by slices, and other connections have their
turn between two of them (slice_queue.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, cast

from gpumesh.mesh.requests.body_sink import BodySink, BufferedSink
from gpumesh.mesh.requests.response_parser import ParserState, ResponseHead, ResponseParser
from gpumesh.slice_queue import FRAME_SLICE_BYTES, MAX_SMALL_PIECES, SLICE_BYTES, SliceQueue

JOINED_BYTES = 1 << 16  # a request's body up to this is sent together with its head
_NO_SINK = BufferedSink()  # of a connection that carries no response; nothing is written to it


class Address(NamedTuple):
    """Where a backend listens: on host and port, or on a Unix socket. ``server_name`` is what its TLS certificate must
    name, if that is not the host."""

    host: str
    port: int
    tls: bool
    server_name: str | None
    socket: str | None

    def __str__(self) -> str:
        return self.socket if self.socket is not None else f"{self.host}:{self.port}"


class ConnectionState(Enum):
    """What a connection does now."""

    IDLE = "idle"  # waits in the pool
    AWAITING_HEAD = "awaiting head"
    RECEIVING_BODY = "receiving body"
    CLOSED = "closed"


# Where each token passes, a global costs less than a member.
_RECEIVING_BODY = ConnectionState.RECEIVING_BODY
_IN_BODY = ParserState.BODY


class ReadState(Enum):
    """Whether more is read from the socket, and what for if not."""

    READING = "reading"
    BACKPRESSURED = "backpressured"  # the sink wants no more for now
    AWAITING_TURN = "awaiting turn"  # for the next slice of what was read


class Exchange:
    """One request on a connection, and its response.

    ``head`` is done when the response's head has come, or with a ConnectionResetError. ``buffer`` holds the body until
    the connection is given another sink. ``connection`` is ``None`` once the response has ended. ``answered``: a part
    of the response came before it failed.
    """

    __slots__ = ("answered", "buffer", "connection", "head")

    def __init__(self, connection: UpstreamConnection, loop: asyncio.AbstractEventLoop) -> None:
        self.head: asyncio.Future[ResponseHead] = loop.create_future()
        self.buffer = BufferedSink()
        self.connection: UpstreamConnection | None = connection
        self.answered = False


class UpstreamConnection(asyncio.Protocol):
    """``on_idle`` is called when the connection may carry another request, ``on_closed`` when it is gone."""

    __slots__ = (
        "__weakref__",
        "_exchange",
        "_loop",
        "_on_closed",
        "_on_idle",
        "_parsed_bytes",
        "_parser",
        "_read_state",
        "_sink",
        "_slice_bytes",
        "_slices",
        "_transport",
        "_unparsed",
        "address",
        "idle_since",
        "requests",
        "state",
    )

    def __init__(
        self,
        address: Address,
        slices: SliceQueue,
        *,
        on_idle: Callable[[UpstreamConnection], None],
        on_closed: Callable[[UpstreamConnection], None],
    ) -> None:
        self.address = address
        self.state = ConnectionState.CLOSED
        self.requests = 0
        self.idle_since = 0.0
        self._slices = slices
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._exchange: Exchange | None = None
        self._sink: BodySink = _NO_SINK
        self._read_state = ReadState.READING
        self._slice_bytes = SLICE_BYTES
        self._unparsed = b""  # what was read while it was not to be parsed
        self._parsed_bytes = 0  # of it, from its start

    def __repr__(self) -> str:
        waiting = f", {len(self._unparsed) - self._parsed_bytes} bytes unparsed" if self._has_unparsed else ""
        reading = "" if self._read_state is ReadState.READING else f" {self._read_state.name}"
        return f"<UpstreamConnection {self.address} {self.state.name}{reading}, {self.requests} requests{waiting}>"

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def reads_on(self) -> bool:
        """Whether the server's next bytes are read when they come."""
        return self._read_state is ReadState.READING

    def start(self, method: str, head: bytes, body: bytes) -> Exchange:
        """Sends a request. The connection must be idle."""
        assert self._transport is not None
        self.requests += 1
        self.state = ConnectionState.AWAITING_HEAD
        self._parser.begin(bodiless=method == "HEAD")
        self._exchange = exchange = Exchange(self, self._loop)
        self.push_to(exchange.buffer)
        if len(body) < JOINED_BYTES:
            self._transport.write(head + body)  # one packet, if it is short
        else:  # not copied
            self._transport.write(head)
            self._transport.write(body)
        return exchange

    def push_to(self, sink: BodySink) -> None:
        """The rest of the response's body goes to this sink."""
        self._sink = sink
        self._slice_bytes = FRAME_SLICE_BYTES if sink.inspects_frames else SLICE_BYTES
        sink.on_writable = self._continue_reading
        if sink.backpressured:
            self._pause_reading(ReadState.BACKPRESSURED)
        else:
            self._continue_reading()

    def abort(self) -> None:
        """Closes the connection, so that the server stops working on its request."""
        self._drop_unparsed()
        if self._transport is not None:
            self._transport.abort()
        self._fail("it was given up")

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are none by their class
        self.state = ConnectionState.IDLE

    def data_received(self, data: bytes) -> None:
        """Each streamed token passes here."""
        if self.state is not _RECEIVING_BODY or self._unparsed or len(data) > self._slice_bytes:
            self._receive(data)
            return
        parser, sink = self._parser, self._sink
        body = parser.feed(data)
        if body:
            sink.write(body)
            if sink.backpressured:
                self._pause_reading(ReadState.BACKPRESSURED)
        if parser.state is not _IN_BODY:
            self._handle_state()

    def _receive(self, data: bytes) -> None:
        """All but the most common case."""
        if self._exchange is None:
            self.abort()  # bytes that nobody asked for: what comes next on this connection cannot be trusted
            return
        self._unparsed, self._parsed_bytes = self._unparsed[self._parsed_bytes :] + data, 0
        if self._read_state is ReadState.READING:
            self._parse_slices()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_closed(self)
        if error is not None:
            self._drop_unparsed()
            self._fail(exception_text(error))
        elif not self._has_unparsed:  # TLS may end a connection while a part of what was read waits to be parsed
            self._end_input()

    # -- parsing -----------------------------------------------------------------------------------------------------

    def _end_input(self) -> None:
        """The server ended the connection, and all that came on it is parsed."""
        self._parser.end_input()
        self._handle_state()
        self._fail("the server closed the connection")

    def _handle_state(self) -> None:
        """Acts on what the parser has come to."""
        parser, exchange = self._parser, self._exchange
        if exchange is None:
            return
        if parser.head is not None and self.state is ConnectionState.AWAITING_HEAD:
            self.state = ConnectionState.RECEIVING_BODY
            if not exchange.head.done():
                exchange.head.set_result(parser.head)
        if parser.state is ParserState.INVALID:
            if self._transport is not None:
                self._transport.abort()
            self._fail(parser.problem or "")
        elif parser.state is ParserState.COMPLETE:
            self._complete(exchange)

    def _complete(self, exchange: Exchange) -> None:
        sink = self._end_exchange(exchange)
        if not self.open or not self._parser.reusable or self._has_unparsed:
            # Bytes after the response spoil the connection, and not the response.
            self._drop_unparsed()
            self.state = ConnectionState.CLOSED
            if self._transport is not None:
                self._transport.abort()
        else:
            self.state = ConnectionState.IDLE
            self._resume_reading()  # the server's end of the connection must be seen while it is idle
            self._on_idle(self)
        sink.finish()

    def _fail(self, problem: str) -> None:
        self.state = ConnectionState.CLOSED
        exchange = self._exchange
        if exchange is None:
            return
        exchange.answered = self._parser.has_fields
        sink = self._end_exchange(exchange)
        if not exchange.head.done():
            exchange.head.set_exception(ConnectionResetError(problem))
            exchange.head.exception()  # marked as seen: the task that waited for it may be gone
        sink.fail(problem)

    def _end_exchange(self, exchange: Exchange) -> BodySink:
        """Forgets the exchange and its sink, which it returns."""
        self._exchange = exchange.connection = None
        sink, self._sink = self._sink, _NO_SINK
        sink.on_writable = None
        return sink

    # -- slices and back-pressure ------------------------------------------------------------------------------------

    @property
    def _has_unparsed(self) -> bool:
        return self._parsed_bytes < len(self._unparsed)

    def _parse_slices(self) -> None:
        """Parses what was read until the sink is back-pressured, or until others should have their turn: after a slice
        of many small pieces, or of frames that the sink inspects."""
        turn_is_over = False
        while self._has_unparsed and self._exchange is not None and not (turn_is_over or self._sink.backpressured):
            start = self._parsed_bytes
            self._parsed_bytes = end = start + self._slice_bytes
            self._parser.piece_count = 0
            body = self._parser.feed(self._unparsed[start:end])
            if body:
                self._sink.write(body)
            self._handle_state()
            turn_is_over = self._parser.piece_count > MAX_SMALL_PIECES or (
                self._sink.inspects_frames and self._has_unparsed
            )
        if not self._has_unparsed:
            self._drop_unparsed()
        if self._exchange is None:
            return
        if turn_is_over:
            self._pause_reading(ReadState.AWAITING_TURN)
            self._slices.add(self._take_turn)
        elif self._sink.backpressured:
            self._pause_reading(ReadState.BACKPRESSURED)
        elif self._transport is None:
            self._end_input()
        else:
            self._resume_reading()

    def _drop_unparsed(self) -> None:
        self._unparsed, self._parsed_bytes = b"", 0

    def _take_turn(self) -> None:
        if self._read_state is ReadState.AWAITING_TURN:
            self._read_state = ReadState.BACKPRESSURED
            self._parse_slices()

    def _continue_reading(self) -> None:
        """Called when the sink takes bytes again."""
        if self._read_state is ReadState.BACKPRESSURED:
            self._parse_slices()

    def _pause_reading(self, reason: ReadState) -> None:
        if self._read_state is ReadState.READING and self._transport is not None:
            self._transport.pause_reading()
        self._read_state = reason

    def _resume_reading(self) -> None:
        if self._read_state is not ReadState.READING:
            self._read_state = ReadState.READING
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()


def exception_text(error: BaseException) -> str:
    """An exception as a person would write it. Some have no text at all."""
    text: Any = getattr(error, "strerror", None) or str(error)
    return str(text) or type(error).__name__
