"""An HTTP/1.1 response parser without I/O: bytes in; a head, pieces of the body and the end out. For a client's side.

On httptools (llhttp, the parser of Node.js and uvicorn). What a server sends is bounded before it is parsed: llhttp
hands a header field over in pieces, and httptools joins them anew with each piece. So the bytes are counted that come
before a field is whole.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import httptools

HEAD_BYTES = 1 << 16  # of a head, of trailers, and of all that comes between two pieces of a body
MAX_FIELDS = 256  # of a head


class ParserState(Enum):
    """How far the response has been parsed."""

    HEAD = "head"
    BODY = "body"
    COMPLETE = "complete"
    INVALID = "invalid"


_BODY = ParserState.BODY  # where each token passes, a global costs less than a member


class ResponseHead(NamedTuple):
    """The head of a response, as the server sent it. ``content_length`` is ``None`` where the head does not say it."""

    status: int
    fields: tuple[tuple[bytes, bytes], ...]
    content_length: int | None


class ResponseParser:
    """Parses the responses of one connection, one after the other: ``begin``, then ``feed`` until the state is COMPLETE
    or INVALID. ``head`` is set from the state BODY on. ``problem`` says why a response is INVALID.

    ``reusable``: after a COMPLETE response, the connection may carry another one.
    ``piece_count``: in how many pieces the body came that the last ``feed`` returned.
    """

    __slots__ = (
        "_bodiless",
        "_complete_pieces",
        "_feed_data",
        "_fields",
        "_head_size",
        "_parser",
        "_pieces",
        "_unframed",
        "_until_eof",
        "head",
        "on_body",
        "piece_count",
        "problem",
        "reusable",
        "state",
    )

    def __init__(self) -> None:
        self.state = ParserState.COMPLETE
        self.head: ResponseHead | None = None
        self.problem: str | None = None
        self.reusable = False
        self.piece_count = 0
        self._pieces: list[bytes] = []  # of the body, while ``feed`` runs
        self._complete_pieces = 0  # of them belong to the response that is complete
        self.on_body = self._pieces.append  # called by httptools: without a Python function on the way
        self._fields: list[tuple[bytes, bytes]] = []
        self._head_size = 0
        self._unframed = 0  # bytes since the last piece of a body
        self._bodiless = False
        self._until_eof = False
        self._parser = httptools.HttpResponseParser(self)
        self._feed_data = self._parser.feed_data

    def __repr__(self) -> str:
        return f"<ResponseParser {self.state.name}>"

    def begin(self, *, bodiless: bool) -> None:
        """A request was sent. ``bodiless``: its response has no body, whatever its head says (HEAD)."""
        self.state = ParserState.HEAD
        self.head = self.problem = None
        self.reusable = False
        self._fields.clear()
        self._head_size = self._unframed = 0
        self._bodiless = bodiless
        self._until_eof = False

    @property
    def has_fields(self) -> bool:
        """Whether at least one field of the head has come."""
        return bool(self._fields) or self.head is not None

    def feed(self, data: bytes) -> bytes:
        """What the body got by these bytes. Bytes after the response's end make the connection not ``reusable``."""
        try:
            self._feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.state is ParserState.COMPLETE:
                self.reusable = False
            else:
                self._reject(f"what it says is not HTTP ({error.__context__ or error})")
        pieces = self._pieces
        if self.state is _BODY and len(pieces) == 1:  # by far the most common
            self._unframed = 0
            self.piece_count = 1
            return pieces.pop()
        return self._join_pieces(len(data))

    def _join_pieces(self, size: int) -> bytes:
        """What the body got by the last ``size`` bytes."""
        pieces = self._pieces
        if self.state is ParserState.COMPLETE:
            del pieces[self._complete_pieces :]
        if not pieces:
            self._unframed += size
            if self._unframed > HEAD_BYTES and self.state is not ParserState.COMPLETE:
                self._reject(f"more than {HEAD_BYTES >> 10} KiB of its answer are no body")
            return b""
        self._unframed = 0
        self.piece_count = len(pieces)
        body = pieces[0] if self.piece_count == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def end_input(self) -> None:
        """The connection has ended in order. That completes a body whose head announces no other end."""
        if self.state is ParserState.BODY and self._until_eof:
            self._complete(reusable=False)

    def _reject(self, problem: str) -> None:
        self.state = ParserState.INVALID
        self.problem = self.problem or problem

    def _complete(self, *, reusable: bool) -> None:
        self.state = ParserState.COMPLETE
        self.reusable = reusable
        self._complete_pieces = len(self._pieces)

    # -- called by httptools -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.state is ParserState.COMPLETE:
            self.reusable = False  # a response that nobody asked for: the first one stands

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > HEAD_BYTES:
            raise httptools.HttpParserError(f"a head of more than {HEAD_BYTES >> 10} KiB")
        if self.state is ParserState.HEAD:
            self._fields.append((name, value))
            if len(self._fields) > MAX_FIELDS:
                raise httptools.HttpParserError(f"a head of more than {MAX_FIELDS} fields")

    def on_headers_complete(self) -> None:
        if self.state is not ParserState.HEAD:
            return
        status = self._parser.get_status_code()
        if status < 200:  # "100 Continue" and its like announce the true response
            self._fields.clear()
            return
        chunked, length = False, None
        for name, value in self._fields:
            lower = name.lower()
            if lower == b"content-length":
                length = int(value) if value.isdigit() else None
            elif lower == b"transfer-encoding":
                chunked = True
        self.head = ResponseHead(status, tuple(self._fields), length)
        self._fields.clear()
        self.state = ParserState.BODY
        self._until_eof = not chunked and length is None and status not in (204, 304)
        if self._bodiless:
            # The parser cannot be told that no body follows: the response ends here, and so does the connection.
            self._complete(reusable=False)

    def on_message_complete(self) -> None:
        if self.state is ParserState.BODY:
            self._complete(reusable=self._parser.should_keep_alive() and not self._until_eof)
