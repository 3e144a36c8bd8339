"""``ResponseParser`` parses HTTP/1.1 responses, without I/O: bytes in; a head, the bytes of the body, and the end out.

It uses httptools (llhttp, the parser of Node.js and uvicorn). llhttp reports a header field in pieces, and httptools
joins all earlier pieces again with each new piece: a long field costs much time. So the bytes outside of a body are
limited even before a field is complete.
"""

from __future__ import annotations

from enum import Enum

import httptools
import msgspec

HEAD_BYTES = 1 << 16  # limit for a head, for the trailers, and for all bytes between two pieces of a body
MAX_FIELDS = 256  # limit for the header fields of one head


class ResponseParserState(Enum):
    """How far the response has been parsed."""

    HEAD = "head"
    BODY = "body"
    COMPLETE = "complete"
    INVALID = "invalid"


_BODY = ResponseParserState.BODY  # each token is compared with it: to read a global is faster than to read a member


class ResponseHead(msgspec.Struct, frozen=True):
    """The head of a response, as the server sent it. ``fields`` are pairs of name and value. ``content_length`` is
    ``None`` if the head holds no valid Content-Length. ``ends_with_connection``: the body ends when the connection
    does, so HTTP cannot tell a cut from the end."""

    status: int
    fields: tuple[tuple[bytes, bytes], ...]
    content_length: int | None
    ends_with_connection: bool = False


class ResponseParser:
    """Parses the responses of one connection, one after the other. For each response, call ``begin``, and then ``feed``
    until the state is COMPLETE or INVALID. ``head`` is set from the state BODY on. ``problem``: why it is INVALID.

    ``reusable``: after a COMPLETE response, the connection may carry another request.
    ``piece_count``: the number of pieces of the body in the last ``feed`` that returned any.
    """

    __slots__ = (
        "_between_chunks",
        "_bodiless",
        "_bytes_outside_body",
        "_complete_pieces",
        "_ends_with_connection",
        "_feed_data",
        "_fields",
        "_head_size",
        "_parser",
        "_pieces",
        "head",
        "on_body",
        "piece_count",
        "problem",
        "reusable",
        "state",
    )

    def __init__(self) -> None:
        self.state = ResponseParserState.COMPLETE
        self.head: ResponseHead | None = None
        self.problem: str | None = None
        self.reusable = False
        self.piece_count = 0
        self._pieces: list[bytes] = []  # pieces of the body; empty except while ``feed`` runs
        self._complete_pieces = 0  # how many of ``_pieces`` belong to the complete response; later ones are dropped
        # httptools calls ``append`` directly: a method of ours in between would cost more.
        self.on_body = self._pieces.append
        self._fields: list[tuple[bytes, bytes]] = []  # of the head that is read now
        self._head_size = 0  # the bytes of its names and values so far
        # How many bytes have come since the last piece of a body: field lines, sizes of chunks, trailers.
        self._bytes_outside_body = 0
        self._bodiless = False  # the response has no body, whatever its head says
        self._between_chunks = False  # whether the next byte begins a chunk
        self._ends_with_connection = False  # the body has no length of its own
        self._parser = httptools.HttpResponseParser(self)
        self._feed_data = self._parser.feed_data

    def __repr__(self) -> str:
        return f"<ResponseParser {self.state.name}>"

    def begin(self, *, bodiless: bool) -> None:
        """Starts the next response: its request is sent now. ``bodiless``: the response has no body, even if its head
        announces one (HEAD)."""
        self.state = ResponseParserState.HEAD
        self.head = self.problem = None
        self.reusable = False
        self._fields.clear()
        self._head_size = self._bytes_outside_body = 0
        self._bodiless = bodiless
        self._between_chunks = False
        self._ends_with_connection = False

    @property
    def has_begun(self) -> bool:
        """Whether any byte has come, of a response or of something else."""
        return self._bytes_outside_body > 0 or self.head is not None

    def feed(self, data: bytes) -> bytes:
        """Parses ``data``, and returns the bytes of the body in it. Bytes after the response's end are dropped, and the
        connection is no longer ``reusable``."""
        if self._between_chunks:
            # Servers write each token as one chunk. llhttp, which waits for the next chunk, need not see a chunk that
            # has come as a whole and is framed in the plainest way. A token then passes through less memory, and most
            # of its cost is memory that is not in the CPU's caches.
            at = data.find(b"\r\n")
            size = len(data) - at - 4
            if 0 < at < 5 and size > 0 and data.endswith(b"\r\n") and data[:at] == b"%x" % size:
                self._bytes_outside_body = 0
                self.piece_count = 1
                return data[at + 2 : -2]
            self._between_chunks = False  # unless a chunk ends here, the size of the next one has begun
        try:
            self._feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.state is ResponseParserState.COMPLETE:  # only what follows the response is wrong
                self.reusable = False
            else:
                self._reject(f"what it says is not HTTP ({error.__context__ or error})")
        if self._between_chunks and not data.endswith(b"\n"):  # the size of the next one has begun
            self._between_chunks = False
        pieces = self._pieces
        if self.state is _BODY and len(pieces) == 1:  # by far the most common case
            self._bytes_outside_body = 0
            self.piece_count = 1
            return pieces.pop()
        return self._join_pieces(len(data))

    def _join_pieces(self, size: int) -> bytes:
        """Removes and joins the pieces of the body that were found in the last ``size`` bytes. Rejects the response if
        too many bytes have come outside of a body."""
        pieces = self._pieces
        if self.state is ResponseParserState.COMPLETE:
            del pieces[self._complete_pieces :]
        if not pieces:
            self._bytes_outside_body += size
            if self._bytes_outside_body > HEAD_BYTES and self.state is not ResponseParserState.COMPLETE:
                self._reject(f"more than {HEAD_BYTES >> 10} KiB of its answer are no body")
            return b""
        self._bytes_outside_body = 0
        self.piece_count = len(pieces)
        body = pieces[0] if self.piece_count == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def end_input(self) -> None:
        """Handles the end of the connection. This completes a body whose head announces no other end."""
        if self.state is ResponseParserState.BODY and self._ends_with_connection:
            self._complete(reusable=False)

    def _reject(self, problem: str) -> None:
        """Enters the state INVALID. Only the first of several problems is kept."""
        self.state = ResponseParserState.INVALID
        self._between_chunks = False
        self.problem = self.problem or problem

    def _complete(self, *, reusable: bool) -> None:
        """Enters the state COMPLETE. Pieces that httptools reports after this belong to no response."""
        self.state = ResponseParserState.COMPLETE
        self._between_chunks = False
        self.reusable = reusable
        self._complete_pieces = len(self._pieces)

    # -- called by httptools -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Notes the start of a response. If it follows a complete response, nobody has asked for it: the first response
        stays valid, but the connection is not used again."""
        if self.state is ResponseParserState.COMPLETE:
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Adds a header field, within the limits. Trailer fields are counted and dropped."""
        self._head_size += len(name) + len(value)
        if self._head_size > HEAD_BYTES:
            raise httptools.HttpParserError(f"a head of more than {HEAD_BYTES >> 10} KiB")
        if self.state is ResponseParserState.HEAD:
            self._fields.append((name, value))
            if len(self._fields) > MAX_FIELDS:
                raise httptools.HttpParserError(f"a head of more than {MAX_FIELDS} fields")

    def on_headers_complete(self) -> None:
        """Sets ``head``, unless this is an interim response (1xx), which a final response follows."""
        if self.state is not ResponseParserState.HEAD:  # the head of a second response, which is dropped
            return
        status = self._parser.get_status_code()
        if status < 200:  # "100 Continue" and other 1xx: the final response follows
            self._fields.clear()
            return
        chunked, length = False, None
        for name, value in self._fields:
            lower_name = name.lower()
            if lower_name == b"content-length":
                length = int(value) if value.isdigit() else None
            elif lower_name == b"transfer-encoding":
                chunked = True
        self._ends_with_connection = not chunked and length is None and status not in (204, 304)
        self.head = ResponseHead(status, tuple(self._fields), length, self._ends_with_connection)
        self._fields.clear()
        self.state = ResponseParserState.BODY
        if self._bodiless:
            # llhttp cannot be told that no body follows. So the response ends here, and the connection is not used
            # again.
            self._complete(reusable=False)

    def on_chunk_header(self) -> None:
        """Notes that a chunk has begun."""
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        """Notes that a chunk has ended."""
        self._between_chunks = self.state is _BODY

    def on_message_complete(self) -> None:
        """Completes the response."""
        if self.state is ResponseParserState.BODY:
            self._complete(reusable=self._parser.should_keep_alive() and not self._ends_with_connection)
