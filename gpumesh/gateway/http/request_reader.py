"""Reads the bytes of one client. They are parsed slice by slice. Reading pauses while too much waits for the handlers,
and a head must be complete in time.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Sequence
from typing import Protocol

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.parser import Event, ParserState, RequestParser
from gpumesh.gateway.http.request_queue import RequestQueue
from gpumesh.slice_queue import MAX_SMALL_PIECES, SLICE_BYTES, SliceQueue

log = logging.getLogger(__name__)

HEAD_SLICE_BYTES = 2 << 10  # bytes outside of a body that are parsed at a time: even so few may be forty requests
LEFT_CHECK_S = 0.05  # between two checks whether the client has left, while the connection is not read
_POLL_EVENTS = getattr(select, "POLLRDHUP", 0)  # poll reports POLLHUP and POLLERR without being asked, on every system


class ReaderOwner(Protocol):
    """The connection, which takes the events."""

    def take_events(self, events: Sequence[Event]) -> None:
        """Handles events of the parser. May pause or stop the reader."""

    def fail_reading(self) -> None:
        """The input could not be parsed because of a bug of ours."""

    def time_out_head(self) -> None:
        """A head was not complete in time."""


class RequestReader:
    """Feeds a parser with the bytes that a transport reads. ``paused``: the transport does not read."""

    def __init__(
        self,
        owner: ReaderOwner,
        queue: RequestQueue,
        transport: asyncio.Transport,
        slices: SliceQueue,
        loop: asyncio.AbstractEventLoop,
        bounds: Bounds,
    ) -> None:
        self.paused = False
        self._owner = owner
        self._queue = queue
        self._transport = transport
        self._parser = RequestParser(bounds.max_head_bytes)
        self._slices = slices
        self._loop = loop
        self._head_timeout_s = bounds.head_timeout_s
        self._unparsed = b""
        self._awaits_turn = False  # ``_parse_next`` is in the queue of slices
        self._stopped = False
        self._closed = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._left_check_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = (
            "stopped" if self._stopped else "queued" if self._awaits_turn else "paused" if self.paused else "reading"
        )
        return f"<RequestReader {state} {self._parser.state.name}, {len(self._unparsed)} bytes unparsed>"

    @property
    def in_head(self) -> bool:
        """A part of a head has come."""
        return self._parser.state is ParserState.READING_HEAD

    def receive(self, data: bytes) -> None:
        """Takes the bytes that the transport has read."""
        if self._stopped:
            return
        if len(data) > HEAD_SLICE_BYTES or self._unparsed:
            self._unparsed += data
            if not self.paused:
                self._parse_slices()
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        parser = self._parser
        try:
            events = parser.feed(data)
            if events:
                if self._head_timer is not None:  # any event means that the head is complete or refused
                    self._head_timer.cancel()
                    self._head_timer = None
                self._owner.take_events(events)
        except Exception:
            log.exception("a request could not be read", extra={"event": "request-failed"})
            self._owner.fail_reading()
        if parser.state is ParserState.READING_HEAD and self._head_timer is None and not self._stopped:
            self._head_timer = self._loop.call_later(self._head_timeout_s, self._end_slow_head)

    def _parse_slices(self) -> None:
        """Parses the unparsed bytes, until the reader is paused or stopped. A slice of many small pieces takes much
        more time than other slices, so after it the other connections have their turn."""
        data, at = self._unparsed, 0
        while at < len(data) and not self.paused and not self._stopped:
            in_body = self._parser.state is ParserState.READING_BODY
            end = at + (SLICE_BYTES if in_body else HEAD_SLICE_BYTES)
            self._parse(data[at:end])
            at = end
            if self._parser.piece_count > MAX_SMALL_PIECES and not self._stopped:
                self._awaits_turn = True
                self.pause()
                self._slices.add(self._parse_next)
        self._unparsed = b"" if self._stopped else data[at:]

    def _parse_next(self) -> None:
        """Resumes reading when the connection's turn has come. If too much of the body waits for the handler, nothing
        happens: the handler resumes the reader when it has taken enough."""
        if self._awaits_turn:
            self._awaits_turn = False
            if self._queue.incoming_fits:
                self.resume()

    def pause(self) -> None:
        if not self.paused and not self._closed:
            self.paused = True
            self._transport.pause_reading()
            if self._left_check_timer is None:
                self._left_check_timer = self._loop.call_later(LEFT_CHECK_S, self._check_left)

    def resume(self) -> None:
        """Reads on, unless the reader waits for its turn, or requests that have been read wait for their answers."""
        if not self.paused or self._closed or self._awaits_turn or self._queue.waiting:
            return
        self.paused = False
        self._parse_slices()
        if not self.paused:
            self._transport.resume_reading()
            if self.in_head and not self._stopped:
                self._restart_head_timer()

    def stop(self) -> None:
        """Nothing more is parsed."""
        self._stopped = True
        self._awaits_turn = False
        self._unparsed = b""
        if self._head_timer is not None:
            self._head_timer.cancel()

    def close(self) -> None:
        """The connection is gone. Drops the reader's references to the connection and its transport: both lead back to
        the reader, and only the garbage collector could free such a cycle."""
        self.stop()
        self._closed = True
        if self._left_check_timer is not None:
            self._left_check_timer.cancel()
        self._parser.close()
        del self._owner, self._transport

    # -- timers ------------------------------------------------------------------------------------------------------

    def _restart_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self._loop.call_later(self._head_timeout_s, self._end_slow_head)

    def _end_slow_head(self) -> None:
        self._head_timer = None
        if not self.paused:  # a paused reader waits for us, not for the client; ``resume`` starts the time again
            self._owner.time_out_head()

    def _check_left(self) -> None:
        """Aborts if the client has left. A paused transport does not notice that, so the socket is polled."""
        self._left_check_timer = None
        if not self.paused:
            return
        if _has_left(self._transport):
            self._transport.abort()
        else:
            self._left_check_timer = self._loop.call_later(LEFT_CHECK_S, self._check_left)


def _has_left(transport: asyncio.Transport) -> bool:
    """Whether the client has ended its side, even if some of its bytes have not been read yet."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _POLL_EVENTS)
    return bool(poll.poll(0))
