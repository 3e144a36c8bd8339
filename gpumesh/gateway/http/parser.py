"""HTTP/1.1 requests parsed from bytes, without a socket: bytes in, events out, and one explicit state.

The engine is llhttp (by httptools), the parser of Node.js and uvicorn. What is added here: the bounds on what it
keeps of a head, the refusal of requests that another server could read differently (request smuggling), and what
follows an offer of another protocol. However the input is cut into pieces, the events are the same, but for where the
body's bytes are cut and for the byte at which a head that is too large is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import httptools

from gpumesh.gateway.http.body_framing import BodyDecoder, MalformedBody, create_body_decoder
from gpumesh.gateway.http.responses import Headers

MAX_FIELDS = 128  # of a head


class ParserState(Enum):
    """``AWAITING_HEAD``: between two requests. ``REFUSED``: nothing more is parsed."""

    AWAITING_HEAD = auto()
    READING_HEAD = auto()
    READING_BODY = auto()
    REFUSED = auto()


class RequestHead:
    """The head of a request. ``target`` is as it came, ``keep_alive`` what the client wants of its connection."""

    __slots__ = ("headers", "is_http10", "keep_alive", "method", "target")

    def __init__(self, method: str, target: str, headers: Headers, is_http10: bool, keep_alive: bool) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.is_http10 = is_http10
        self.keep_alive = keep_alive

    def __repr__(self) -> str:
        return f"<RequestHead {self.method} {self.target}>"


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """The body has ended. ``whole``: as its head announced; otherwise its framing is broken, and no event follows."""

    whole: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """What came is no request. ``status`` and ``message`` are for the answer; no event follows."""

    status: int
    message: str


Event = RequestHead | bytes | RequestEnd | Refusal
"""``bytes``: a piece of the body of the request whose head came last."""

_WHOLE, _BROKEN = RequestEnd(whole=True), RequestEnd(whole=False)
_NOT_HTTP = Refusal(400, "this is not HTTP")
_WRONG_VERSION = Refusal(400, "HTTP/1.1 and 1.0 are spoken here")
_AMBIGUOUS = Refusal(400, "what this request means is not clear")
_HEAD_TOO_LARGE = Refusal(431, "the request's head is too large")


class _RefusedError(Exception):
    """Ends the engine's work from one of its callbacks."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


class RequestParser:
    """Parses what one client sends. ``piece_count``: how many pieces the last input had of bodies, before they were
    joined. ``close`` it at the end, or its engine and it wait for the garbage collector.
    """

    def __init__(self, max_head_bytes: int) -> None:
        self.state = ParserState.AWAITING_HEAD
        self.piece_count = 0
        self._max_head_bytes = max_head_bytes
        self._engine = httptools.HttpRequestParser(self)
        self._events: list[Event] = []
        self._pieces: list[bytes] = []  # of a body, until they are joined
        self._target = b""
        self._fields: list[tuple[str, str]] = []  # of the head, then of the trailers
        self._head_size = 0  # of what is complete of the target, the fields and the trailers
        self._framing_size = 0  # bytes since the last piece of a body or the end of a request: the engine may keep them
        self._decoder: BodyDecoder | None = None  # of the body behind an offer of another protocol

    def __repr__(self) -> str:
        return f"<RequestParser {self.state.name}>"

    def close(self) -> None:
        self.state = ParserState.REFUSED
        self._events, self._pieces = [], []
        del self._engine

    def feed(self, data: bytes) -> list[Event]:
        """The events that this input brings."""
        self.piece_count = 0
        while data and self.state is not ParserState.REFUSED:
            data = self._feed_engine(data) if self._decoder is None else self._feed_decoder(self._decoder, data)
        if self._pieces:
            self._join_pieces()
        if self._framing_size > self._max_head_bytes:
            self._refuse(_HEAD_TOO_LARGE)
        events, self._events = self._events, []
        return events

    def _feed_engine(self, data: bytes) -> bytes:
        """Returns the bytes that the engine left."""
        self._framing_size += len(data)
        try:
            self._engine.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # Nobody must take up such an offer: JDK's HTTP client offers HTTP/2 in the first request of a connection.
            # The request is one like any other. But the engine takes its head for the whole of it, and goes on with
            # the next request: so its body, if it has one, is not the engine's to parse.
            offset: int = offer.args[0]
            if self._decoder is not None:
                self._framing_size = 0
            return data[offset:]
        except httptools.HttpParserError as error:
            self._refuse(_refusal_of(error))
        return b""

    def _feed_decoder(self, decoder: BodyDecoder, data: bytes) -> bytes:
        """Returns the bytes behind the body."""
        before = len(self._pieces)
        try:
            rest = decoder.feed(data, self._pieces)
        except MalformedBody:
            self._refuse(_NOT_HTTP)
            return b""
        self._framing_size = 0 if len(self._pieces) > before else self._framing_size + len(data)
        if decoder.complete:
            self._decoder = None
            self._end_request()
        return rest

    def _join_pieces(self) -> None:
        """Thousands of small pieces would each cost memory of their own."""
        pieces = self._pieces
        self.piece_count += len(pieces)
        self._events.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        pieces.clear()

    def _end_request(self) -> None:
        if self._pieces:
            self._join_pieces()
        self._framing_size = 0
        self._events.append(_WHOLE)
        self.state = ParserState.AWAITING_HEAD

    def _refuse(self, refusal: Refusal) -> None:
        if self._pieces:
            self._join_pieces()
        if self.state is not ParserState.REFUSED:
            # In a body the request has been accepted already: its handler sees that the body is broken.
            self._events.append(_BROKEN if self.state is ParserState.READING_BODY else refusal)
            self.state = ParserState.REFUSED

    # -- called by the engine ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.state = ParserState.READING_HEAD
        self._head_size = 0
        self._fields = []

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._head_size += len(url)
        if self._head_size > self._max_head_bytes:
            raise _RefusedError(_HEAD_TOO_LARGE)

    def on_header(self, name: bytes, value: bytes) -> None:
        fields = self._fields
        # The engine leaves the blanks behind a value, which do not belong to it.
        fields.append((name.decode("latin-1"), value.rstrip().decode("utf-8", "surrogateescape")))
        self._head_size = size = self._head_size + len(name) + len(value) + 4
        if size > self._max_head_bytes or len(fields) > MAX_FIELDS:
            raise _RefusedError(_HEAD_TOO_LARGE)

    def on_headers_complete(self) -> None:
        engine = self._engine
        headers, target = Headers(tuple(self._fields)), self._target.decode("latin-1")
        self._fields, self._target = [], b""  # what comes now are trailers, which nobody here needs
        version = engine.get_http_version()
        is_http10 = version == "1.0"
        if not is_http10 and version != "1.1":
            raise _RefusedError(_WRONG_VERSION)
        has_coding = "transfer-encoding" in headers
        if (has_coding or len(headers) < len(headers.pairs)) and _is_ambiguous(headers):
            raise _RefusedError(_AMBIGUOUS)
        if engine.should_upgrade():
            self._decoder = create_body_decoder(headers)
        # HTTP/1.0 knows no chunks: where such a body ends is a guess, after which nothing is safe to read.
        keep_alive = engine.should_keep_alive() and not (is_http10 and has_coding)
        method = engine.get_method().decode("latin-1")
        self._events.append(RequestHead(method, target, headers, is_http10, keep_alive))
        self.state = ParserState.READING_BODY

    def on_body(self, data: bytes) -> None:
        self._framing_size = 0
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        if self._decoder is None:
            self._end_request()


def _refusal_of(error: httptools.HttpParserError) -> Refusal:
    """Raises what a callback raised that is no refusal."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    if isinstance(cause, _RefusedError):
        return cause.refusal
    if cause is not None and not isinstance(cause, httptools.HttpParserError):
        raise cause
    return _NOT_HTTP


def _is_ambiguous(headers: Headers) -> bool:
    """Whether another server that reads this head could take it for something else (RFC 9112 sections 3.2 and 6.3)."""
    codings = [value.lower() for name, value in headers.pairs if name.lower() == "transfer-encoding"]
    hosts = sum(name.lower() == "host" for name, _ in headers.pairs)
    return codings not in ([], ["chunked"]) or hosts > 1
