"""``UpstreamConnection``: a connection to a backend that pushes each response's body into a sink as it arrives.

One read can hold thousands of chunks. Such a read is parsed in slices, and other connections have their turn between
two slices (slice_queue.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, cast

from gpumesh.event_loop.slice_queue import FRAME_SLICE_BYTES, MAX_SMALL_PIECES, SLICE_BYTES, SliceQueue
from gpumesh.event_loop.turn_writes import TurnWrites
from gpumesh.mesh.requests.body_sink import BodySink, BufferedSink
from gpumesh.mesh.requests.connections.response_parser import ResponseHead, ResponseParser, ResponseParserState
from gpumesh.mesh.requests.long_body import LongBody

JOINED_BYTES = 1 << 16  # a shorter body is sent together with its head: a copy costs less than a second write
_NO_SINK = BufferedSink()  # the sink of a connection without an exchange; nothing is written to this sink


class Address(NamedTuple):
    """The address on which a backend listens: host and port, or a Unix socket. ``server_name`` is the name in its TLS
    certificate, if that is not ``host``."""

    host: str
    port: int
    tls: bool
    server_name: str | None
    socket: str | None

    def __str__(self) -> str:
        return self.socket if self.socket is not None else f"{self.host}:{self.port}"


class UpstreamConnectionState(Enum):
    """The state of a connection to a backend."""

    IDLE = "idle"  # waits in the pool
    AWAITING_HEAD = "awaiting head"
    RECEIVING_BODY = "receiving body"
    CLOSED = "closed"


# Each token is compared with these: to read a global is faster than to read a member.
_RECEIVING_BODY = UpstreamConnectionState.RECEIVING_BODY
_IN_BODY = ResponseParserState.BODY


class ReadState(Enum):
    """Whether bytes are read from the socket; if not, the reason why."""

    READING = "reading"
    BACKPRESSURED = "backpressured"  # the sink wants no more bytes for now
    AWAITING_TURN = "awaiting turn"  # the connection waits to parse the next slice


_READING = ReadState.READING  # a global, as ``_IN_BODY``


class Exchange:
    """One request on a connection, and its response.

    ``head`` is the future of the response's head; it fails with ConnectionResetError if no head comes. ``buffer`` holds
    the body until the connection gets another sink. ``connection`` is ``None`` after the response has ended.
    ``answered`` is set when the exchange fails: bytes had come before, so the server has got the request.
    """

    __slots__ = ("answered", "buffer", "connection", "head")

    def __init__(self, connection: UpstreamConnection, loop: asyncio.AbstractEventLoop) -> None:
        self.head: asyncio.Future[ResponseHead] = loop.create_future()
        self.buffer = BufferedSink()
        self.connection: UpstreamConnection | None = connection
        self.answered = False


class UpstreamConnection(asyncio.Protocol):
    """A connection that carries one exchange after the other. ``on_idle`` is called when the connection may carry
    another request, ``on_closed`` when the connection is gone. ``request_count``: the requests that it has carried.

    A class a little longer than 250 lines: each token passes here, and through few objects.
    """

    __slots__ = (
        "__weakref__",
        "_exchange",
        "_long_body",
        "_loop",
        "_on_closed",
        "_on_idle",
        "_parsed_bytes",
        "_parser",
        "_read_state",
        "_sink",
        "_slice_bytes",
        "_slice_queue",
        "_transport",
        "_turn_writes",
        "_unparsed",
        "address",
        "idle_since",
        "request_count",
        "state",
    )

    def __init__(
        self,
        address: Address,
        slices: SliceQueue,
        turn_writes: TurnWrites,
        *,
        on_idle: Callable[[UpstreamConnection], None],
        on_closed: Callable[[UpstreamConnection], None],
    ) -> None:
        self.address = address
        self.state = UpstreamConnectionState.CLOSED
        self.request_count = 0
        self.idle_since = 0.0
        self._slice_queue = slices
        self._turn_writes = turn_writes
        self._long_body: LongBody | None = None  # of the current exchange, if it is sent piece by piece
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._exchange: Exchange | None = None
        self._sink: BodySink = _NO_SINK  # gets the body of the current response
        self._read_state = ReadState.READING
        self._slice_bytes = SLICE_BYTES  # fewer for a sink that inspects frames
        self._unparsed = b""  # bytes that were read, but could not be parsed at once
        self._parsed_bytes = 0  # how many bytes at the start of ``_unparsed`` have been parsed already

    def __repr__(self) -> str:
        waiting = f", {len(self._unparsed) - self._parsed_bytes} bytes unparsed" if self._has_unparsed else ""
        reading = "" if self._read_state is ReadState.READING else f" {self._read_state.name}"
        return f"<UpstreamConnection {self.address} {self.state.name}{reading}, {self.request_count} requests{waiting}>"

    @property
    def open(self) -> bool:
        """Whether the connection can still be used."""
        return self._transport is not None and not self._transport.is_closing()

    def start_exchange(self, method: str, head: bytes, body: bytes) -> Exchange:
        """Sends a request, and returns its exchange. The connection must be idle."""
        assert self._transport is not None, "the connection is not open"
        self.request_count += 1
        self.state = UpstreamConnectionState.AWAITING_HEAD
        self._parser.begin(bodiless=method == "HEAD")
        self._exchange = exchange = Exchange(self, self._loop)
        self._sink = sink = exchange.buffer  # ``push_to``, shorter: an idle connection reads, and the buffer is empty
        self._slice_bytes = SLICE_BYTES
        sink.on_writable = self._continue_reading
        if len(body) < JOINED_BYTES:
            self._turn_writes.write(self._transport, head + body)
        elif self.address.tls:
            self._transport.write(head)
            self._long_body = LongBody(self._transport, body, self._loop)
            self._long_body.start()
        else:  # a long body is not copied
            self._transport.write(head)
            self._transport.write(body)
        return exchange

    def push_to(self, sink: BodySink) -> None:
        """Pushes the rest of the response's body to this sink."""
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

    def pause_writing(self) -> None:
        """Stops the writing of a long body, because the transport's buffer is full."""
        if self._long_body is not None:
            self._long_body.pause()

    def resume_writing(self) -> None:
        """Goes on with a long body."""
        if self._long_body is not None:
            self._long_body.resume()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Makes the connection ready for its first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclasses of it
        self.state = UpstreamConnectionState.IDLE

    def data_received(self, data: bytes) -> None:
        """Parses the bytes, and pushes the body into the sink. Each streamed token passes here."""
        may_parse_now = self._exchange is not None and not self._unparsed and self._read_state is _READING
        if not may_parse_now or len(data) > self._slice_bytes:
            self._receive(data)
            return
        parser, sink = self._parser, self._sink
        body = parser.feed(data)
        if body:
            sink.write(body)
            if sink.backpressured:
                self._pause_reading(ReadState.BACKPRESSURED)
        if parser.state is not _IN_BODY or self.state is not _RECEIVING_BODY:
            self._handle_state()

    def _receive(self, data: bytes) -> None:
        """Does the work of ``data_received`` in all cases but the most common one."""
        if self._exchange is None:
            self.abort()  # bytes without a request: later bytes on this connection could be taken for an answer
            return
        if self._unparsed:
            data = self._unparsed[self._parsed_bytes :] + data
        self._unparsed, self._parsed_bytes = data, 0
        if self._read_state is ReadState.READING:
            self._parse_slices()

    def connection_lost(self, error: Exception | None) -> None:
        """Ends the exchange, after all bytes that have come are parsed, or at once if ``error`` ended the
        connection."""
        self._transport = None
        self._on_closed(self)
        if error is not None:
            self._drop_unparsed()
            self._fail(exception_text(error))
            return
        # TLS can end while bytes are unparsed. Then ``_parse_slices`` calls ``_end_input`` after the last byte.
        if not self._has_unparsed:
            self._end_input()

    # -- parsing -----------------------------------------------------------------------------------------------------

    def _end_input(self) -> None:
        """Handles the end of the connection, after all its bytes have been parsed."""
        self._parser.end_input()
        self._handle_state()
        self._fail("the server closed the connection")

    def _handle_state(self) -> None:
        """Acts on the parser's state: passes on the head, and ends a complete or invalid response."""
        parser, exchange = self._parser, self._exchange
        if exchange is None:
            return
        if parser.head is not None and self.state is UpstreamConnectionState.AWAITING_HEAD:
            self.state = UpstreamConnectionState.RECEIVING_BODY
            if not exchange.head.done():
                exchange.head.set_result(parser.head)
        if parser.state is ResponseParserState.INVALID:
            if self._transport is not None:
                self._transport.abort()
            self._fail(parser.problem or "")
        elif parser.state is ResponseParserState.COMPLETE:
            self._complete(exchange)

    def _complete(self, exchange: Exchange) -> None:
        """Ends the exchange, whose response is complete. The connection becomes idle, or is closed if it cannot carry
        another request."""
        is_sent = self._long_body is None or self._long_body.complete
        sink = self._end_exchange(exchange)
        # Bytes after the response make the connection unusable, but the response is valid.
        has_rest = bool(self._unparsed) and self._has_unparsed  # the first test alone is cheaper, and mostly false
        if self._parser.reusable and not has_rest and is_sent and self.open:
            self.state = UpstreamConnectionState.IDLE
            if self._read_state is not _READING:  # an idle connection must notice when the server closes it
                self._resume_reading()
            self._on_idle(self)
        else:
            self._drop_unparsed()
            self.state = UpstreamConnectionState.CLOSED
            if self._transport is not None:
                self._transport.abort()
        sink.finish()

    def _fail(self, problem: str) -> None:
        """Marks the connection as closed. If there is an exchange, it fails with this problem."""
        self.state = UpstreamConnectionState.CLOSED
        exchange = self._exchange
        if exchange is None:
            return
        exchange.answered = self._parser.has_begun
        sink = self._end_exchange(exchange)
        if not exchange.head.done():
            exchange.head.set_exception(ConnectionResetError(problem))
            exchange.head.exception()  # marks the error as retrieved: asyncio would log it if the waiting task is gone
        sink.fail(problem)

    def _end_exchange(self, exchange: Exchange) -> BodySink:
        """Removes the exchange from the connection, and returns the sink that the response was pushed to."""
        self._exchange = exchange.connection = None
        if self._long_body is not None:
            self._long_body.drop()
            self._long_body = None
        sink, self._sink = self._sink, _NO_SINK
        sink.on_writable = None
        return sink

    # -- slices and back-pressure ------------------------------------------------------------------------------------

    @property
    def _has_unparsed(self) -> bool:
        """Whether bytes were read that are not parsed yet."""
        return self._parsed_bytes < len(self._unparsed)

    def _parse_slices(self) -> None:
        """Parses the unparsed bytes, slice by slice. Stops when the sink is back-pressured, or when this connection's
        turn is over: after a slice with many small pieces, or with frames that the sink inspects."""
        turn_is_over = False
        while self._has_unparsed and self._exchange is not None:
            if turn_is_over or self._sink.backpressured:
                break
            start = self._parsed_bytes
            self._parsed_bytes = end = start + self._slice_bytes
            self._parser.piece_count = 0
            body = self._parser.feed(self._unparsed[start:end])
            if body:
                self._sink.write(body)
            self._handle_state()
            has_more_frames = self._sink.inspects_frames and self._has_unparsed
            turn_is_over = has_more_frames or self._parser.piece_count > MAX_SMALL_PIECES
        if not self._has_unparsed:
            self._drop_unparsed()
        if self._exchange is None:
            return
        if turn_is_over:
            self._pause_reading(ReadState.AWAITING_TURN)
            self._slice_queue.add(self._take_turn)
        elif self._sink.backpressured:
            self._pause_reading(ReadState.BACKPRESSURED)
        elif self._transport is None:
            self._end_input()
        else:
            self._resume_reading()

    def _drop_unparsed(self) -> None:
        """Forgets the bytes that were read but not parsed."""
        self._unparsed, self._parsed_bytes = b"", 0

    def _take_turn(self) -> None:
        """Parses the next slice, because this connection's turn has come."""
        if self._read_state is ReadState.AWAITING_TURN:
            # The turn has come, but the socket is still not read. ``_parse_slices`` decides whether reading goes on.
            self._read_state = ReadState.BACKPRESSURED
            self._parse_slices()

    def _continue_reading(self) -> None:
        """Parses and reads on. The sink calls this when it takes bytes again."""
        if self._read_state is ReadState.BACKPRESSURED:
            self._parse_slices()

    def _pause_reading(self, reason: ReadState) -> None:
        """Stops reading from the socket. ``reason`` becomes the state."""
        if self._read_state is ReadState.READING and self._transport is not None:
            self._transport.pause_reading()
        self._read_state = reason

    def _resume_reading(self) -> None:
        """Reads from the socket again. Does nothing if the socket is being read."""
        if self._read_state is not ReadState.READING:
            self._read_state = ReadState.READING
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()


def exception_text(error: BaseException) -> str:
    """The text of an exception for a person: without the error number, or the class name if there is no text."""
    text: Any = getattr(error, "strerror", None) or str(error)  # an OSError has its text without the number
    return str(text) or type(error).__name__
