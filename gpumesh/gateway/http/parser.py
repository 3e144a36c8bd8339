"""``RequestParser`` parses HTTP/1.1 requests without a socket: bytes in, events out, and one explicit state.

The engine is llhttp (by httptools), the parser of Node.js and uvicorn. This module adds three things: limits on the
size of a head, the refusal of requests that another server could read differently (request smuggling), and the reading
of a body after an offer of another protocol. The same input gives the same events, however it is cut into pieces. Only
two things may differ: where the bytes of a body are cut, and at which byte a head that is too large is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import httptools

from gpumesh.gateway.http.bodies.body_framing import BodyDecoder, MalformedBody, create_body_decoder
from gpumesh.gateway.http.responses import Headers

MAX_FIELDS = 128  # limit for the header fields of a head


class RequestParserState(Enum):
    """How far the current request has been parsed. ``AWAITING_HEAD``: between two requests. ``REFUSED``: nothing more
    is parsed."""

    AWAITING_HEAD = auto()
    READING_HEAD = auto()
    READING_BODY = auto()
    REFUSED = auto()


class RequestHead:
    """The head of a request. ``target``: the path and query as they came. ``keep_alive``: the client wants the
    connection to stay after the answer."""

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
    """The end of a body. ``whole``: the body is as its head announced. Otherwise its framing is broken, and this is the
    last event."""

    whole: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """The input is no acceptable request. ``status`` and ``message`` are for the answer. This is the last event."""

    status: int
    message: str


Event = RequestHead | bytes | RequestEnd | Refusal
"""What a parser reports. ``bytes`` are a piece of the body of the request whose head came last."""

_WHOLE, _BROKEN = RequestEnd(whole=True), RequestEnd(whole=False)
_NOT_HTTP = Refusal(400, "this is not HTTP")
_WRONG_VERSION = Refusal(400, "HTTP/1.1 and 1.0 are spoken here")
_AMBIGUOUS = Refusal(400, "what this request means is not clear")
_HEAD_TOO_LARGE = Refusal(431, "the request's head is too large")


class _RefusalError(Exception):
    """Raised in a callback of the engine, to stop it."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


class RequestParser:
    """Parses the bytes of one client. ``piece_count``: the number of pieces of bodies in the last input, before they
    were joined. Call ``close`` at the end: the parser and its engine refer to each other, so otherwise only the garbage
    collector would free them.
    """

    def __init__(self, max_head_bytes: int) -> None:
        self.state = RequestParserState.AWAITING_HEAD
        self.piece_count = 0
        self._max_head_bytes = max_head_bytes
        self._engine = httptools.HttpRequestParser(self)
        self._events: list[Event] = []  # those of this call of ``feed``
        self._pieces: list[bytes] = []  # pieces of a body, until they are joined
        self._target = b""  # of the head that is read now
        self._fields: list[tuple[str, str]] = []  # header fields, then trailer fields
        self._head_size = 0  # bytes of the target and of the complete fields, with the trailers
        # Bytes since the last piece of a body or the last end of a request. The engine may hold all of them.
        self._framing_size = 0
        self._decoder: BodyDecoder | None = None  # for a body after an offer of another protocol

    def __repr__(self) -> str:
        return f"<RequestParser {self.state.name}>"

    def close(self) -> None:
        """Stops the parsing, and frees the engine."""
        self.state = RequestParserState.REFUSED
        self._events, self._pieces = [], []
        del self._engine

    def feed(self, data: bytes) -> list[Event]:
        """Parses this input, and returns the events that it completes."""
        self.piece_count = 0
        while data and self.state is not RequestParserState.REFUSED:
            data = self._feed_engine(data) if self._decoder is None else self._feed_decoder(self._decoder, data)
        if self._pieces:
            self._join_pieces()
        if self._framing_size > self._max_head_bytes:
            self._refuse(_HEAD_TOO_LARGE)
        events, self._events = self._events, []
        return events

    def _feed_engine(self, data: bytes) -> bytes:
        """Parses with the engine, and returns the bytes that the engine did not take."""
        self._framing_size += len(data)
        try:
            self._engine.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # A server may ignore such an offer, and we do. JDK's HTTP client offers HTTP/2 in the first request of each
            # connection. But the engine takes the head for the whole request, and stops after it. So if the
            # request has a body, ``_decoder`` reads it and not the engine.
            offset: int = offer.args[0]  # the index after the head
            if self._decoder is not None:
                self._framing_size = 0  # the head is complete; ``_feed_decoder`` counts from here on
            return data[offset:]
        except httptools.HttpParserError as error:
            self._refuse(_find_refusal(error))
        return b""

    def _feed_decoder(self, decoder: BodyDecoder, data: bytes) -> bytes:
        """Reads a body that the engine does not read, and returns the bytes after the body."""
        pieces_before = len(self._pieces)
        try:
            rest = decoder.feed(data, self._pieces)
        except MalformedBody:
            self._refuse(_NOT_HTTP)
            return b""
        self._framing_size = 0 if len(self._pieces) > pieces_before else self._framing_size + len(data)
        if decoder.complete:
            self._decoder = None
            self._end_request()
        return rest

    def _join_pieces(self) -> None:
        """Makes one event of all pieces: as thousands of small events they would each cost memory of their own."""
        pieces = self._pieces
        self.piece_count += len(pieces)
        self._events.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        pieces.clear()

    def _end_request(self) -> None:
        """Adds the event of a whole request's end. The next request may follow."""
        if self._pieces:
            self._join_pieces()
        self._framing_size = 0
        self._events.append(_WHOLE)
        self.state = RequestParserState.AWAITING_HEAD

    def _refuse(self, refusal: Refusal) -> None:
        """Adds the last event: the refusal, or the end of a broken body. Does nothing if there is a last event."""
        if self._pieces:
            self._join_pieces()
        if self.state is not RequestParserState.REFUSED:
            # While a body is being read, its request has been accepted already. The handler sees that it is broken.
            self._events.append(_BROKEN if self.state is RequestParserState.READING_BODY else refusal)
            self.state = RequestParserState.REFUSED

    # -- called by the engine ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Starts a new head."""
        self.state = RequestParserState.READING_HEAD
        self._head_size = 0
        self._fields = []

    def on_url(self, url: bytes) -> None:
        """Adds a piece of the target."""
        self._target += url
        self._head_size += len(url)
        if self._head_size > self._max_head_bytes:
            raise _RefusalError(_HEAD_TOO_LARGE)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Adds a header field or a trailer field, within the limits."""
        fields = self._fields
        # The blanks after a value do not belong to it, but the engine does not remove them.
        fields.append((name.decode("latin-1"), value.rstrip().decode("utf-8", "surrogateescape")))
        self._head_size = size = self._head_size + len(name) + len(value) + 4  # ": " and the line end
        if size > self._max_head_bytes or len(fields) > MAX_FIELDS:
            raise _RefusalError(_HEAD_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """Adds the event of a complete head, unless the head must be refused."""
        engine = self._engine
        headers, target = Headers(tuple(self._fields)), self._target.decode("latin-1")
        self._fields, self._target = [], b""  # the next fields are trailers, which are dropped
        version = engine.get_http_version()
        is_http10 = version == "1.0"
        if not is_http10 and version != "1.1":
            raise _RefusalError(_WRONG_VERSION)
        is_chunked = "transfer-encoding" in headers
        has_repeated_names = len(headers) < len(headers.pairs)
        if (is_chunked or has_repeated_names) and _is_ambiguous(headers):  # most heads are neither: no call
            raise _RefusalError(_AMBIGUOUS)
        if engine.should_upgrade():
            self._decoder = create_body_decoder(headers)
        # HTTP/1.0 has no chunks. The end of such a body is a guess, so nothing after it is safe to read.
        keep_alive = engine.should_keep_alive() and not (is_http10 and is_chunked)
        method = engine.get_method().decode("latin-1")
        self._events.append(RequestHead(method, target, headers, is_http10, keep_alive))
        self.state = RequestParserState.READING_BODY

    def on_body(self, data: bytes) -> None:
        """Adds a piece of the body."""
        self._framing_size = 0
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Ends the request, unless ``_decoder`` reads its body."""
        if self._decoder is None:
            self._end_request()


def _find_refusal(error: httptools.HttpParserError) -> Refusal:
    """Returns the refusal for this error of the engine. If a callback raised another error than ``_RefusalError``, this
    error is raised again, because it is a bug of ours."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    if isinstance(cause, _RefusalError):
        return cause.refusal
    if cause is not None and not isinstance(cause, httptools.HttpParserError):
        raise cause
    return _NOT_HTTP


def _is_ambiguous(headers: Headers) -> bool:
    """Whether another server could read this head differently (RFC 9112 sections 3.2 and 6.3): it names several hosts,
    or a body in another coding than chunks."""
    codings = [value.lower() for name, value in headers.pairs if name.lower() == "transfer-encoding"]
    host_count = sum(name.lower() == "host" for name, _ in headers.pairs)
    return host_count > 1 or codings not in ([], ["chunked"])
