"""``RequestReader`` parses the bytes of one client, slice by slice.

Reading pauses while too many requests or bytes wait for the handlers. A head must be complete in time.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Sequence
from typing import Protocol

from gpumesh.event_loop.slice_queue import MAX_SMALL_PIECES, SLICE_BYTES, SliceQueue
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.parser import Event, RequestParser, RequestParserState
from gpumesh.gateway.http.request_queue import RequestQueue

log = logging.getLogger(__name__)

HEAD_SLICE_BYTES = 2 << 10  # bytes outside of a body that are parsed at a time: even so few bytes may be forty requests
DEPARTURE_CHECK_S = 0.05  # between two checks whether the client has left, while the connection is not read
_POLL_EVENTS = getattr(select, "POLLRDHUP", 0)  # poll reports POLLHUP and POLLERR without being asked, on every system


class ReaderOwner(Protocol):
    """The connection: it takes the events of the parser."""

    def take_events(self, events: Sequence[Event]) -> None:
        """Handles these events. May pause or stop the reader."""

    def fail_reading(self) -> None:
        """Ends the reading, because the input could not be parsed: a bug of ours."""

    def time_out_head(self) -> None:
        """Refuses the request, because its head was not complete in time."""


class RequestReader:
    """Feeds a parser with the bytes that a transport reads, and passes on its events. ``paused``: nothing is read."""

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
        self._unparsed = b""  # bytes that wait for their turn, or for the end of a pause
        self._awaits_turn = False  # whether ``_parse_next`` is in the queue of slices
        self._stopped = False  # bytes that come are dropped
        self._closed = False  # the connection is gone, and with it the transport
        self._head_timer: asyncio.TimerHandle | None = None  # runs while a head is not complete
        self._departure_timer: asyncio.TimerHandle | None = None  # runs to the next check whether the client has left

    def __repr__(self) -> str:
        state = "paused" if self.paused else "reading"
        if self._stopped:
            state = "stopped"
        elif self._awaits_turn:
            state = "queued"
        return f"<RequestReader {state} {self._parser.state.name}, {len(self._unparsed)} bytes unparsed>"

    @property
    def in_head(self) -> bool:
        """Whether a part of a head has come, but not all of it."""
        return self._parser.state is RequestParserState.READING_HEAD

    def receive(self, data: bytes) -> None:
        """Parses the bytes that the transport has read, or keeps them until they can be parsed."""
        if self._stopped:
            return
        if len(data) > HEAD_SLICE_BYTES or self._unparsed:
            self._unparsed += data
            if not self.paused:
                self._parse_slices()
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Parses the data at once, and passes the events on. Starts the timer of a head that is not complete."""
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
        # A head has begun: its timer is not running yet, and no event has refused the input.
        if parser.state is RequestParserState.READING_HEAD and self._head_timer is None and not self._stopped:
            self._head_timer = self._loop.call_later(self._head_timeout_s, self._end_slow_head)

    def _parse_slices(self) -> None:
        """Parses the unparsed bytes, until the reader is paused or stopped. A slice of many small pieces takes much
        more time than other slices, so after it the other connections have their turn."""
        data, start = self._unparsed, 0
        while start < len(data) and not self.paused and not self._stopped:
            in_body = self._parser.state is RequestParserState.READING_BODY
            end = start + (SLICE_BYTES if in_body else HEAD_SLICE_BYTES)
            self._parse(data[start:end])
            start = end
            if self._parser.piece_count > MAX_SMALL_PIECES and not self._stopped:
                self._awaits_turn = True
                self.pause()
                self._slices.add(self._parse_next)
        self._unparsed = b"" if self._stopped else data[start:]

    def _parse_next(self) -> None:
        """Resumes reading, because the connection's turn has come. Does nothing if too much of the body waits for the
        handler: the handler resumes the reader when it has taken the waiting bytes."""
        if self._awaits_turn:
            self._awaits_turn = False
            if self._queue.incoming_fits:
                self.resume()

    def pause(self) -> None:
        """Stops reading until ``resume``. Meanwhile a timer checks whether the client has left."""
        if not self.paused and not self._closed:
            self.paused = True
            self._transport.pause_reading()
            if self._departure_timer is None:
                self._departure_timer = self._loop.call_later(DEPARTURE_CHECK_S, self._check_departure)

    def resume(self) -> None:
        """Reads on, unless the reader waits for its turn, or requests that were read before wait for their answers."""
        if not self.paused or self._closed or self._awaits_turn or self._queue.waiting:
            return
        self.paused = False
        self._parse_slices()
        if not self.paused:
            self._transport.resume_reading()
            if self.in_head and not self._stopped:
                self._restart_head_timer()

    def stop(self) -> None:
        """Drops all bytes from now on without parsing them."""
        self._stopped = True
        self._awaits_turn = False
        self._unparsed = b""
        if self._head_timer is not None:
            self._head_timer.cancel()

    def close(self) -> None:
        """Ends the reader, because the connection is gone. Drops the references to the connection and its transport:
        both lead back to the reader, and only the garbage collector could free such a cycle."""
        self.stop()
        self._closed = True
        if self._departure_timer is not None:
            self._departure_timer.cancel()
        self._parser.close()
        del self._owner, self._transport

    # -- timers ------------------------------------------------------------------------------------------------------

    def _restart_head_timer(self) -> None:
        """Gives the client the full time for its head again."""
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self._loop.call_later(self._head_timeout_s, self._end_slow_head)

    def _end_slow_head(self) -> None:
        """Refuses the request, because its head is too slow."""
        self._head_timer = None
        if not self.paused:  # while paused, the reader does not wait for the client; ``resume`` starts the timer again
            self._owner.time_out_head()

    def _check_departure(self) -> None:
        """Aborts if the client has left. A paused transport does not notice that, so the socket is polled."""
        self._departure_timer = None
        if not self.paused:
            return
        if _has_left(self._transport):
            self._transport.abort()
        else:
            self._departure_timer = self._loop.call_later(DEPARTURE_CHECK_S, self._check_departure)


def _has_left(transport: asyncio.Transport) -> bool:
    """Whether the client has ended its side, even if some of its bytes have not been read yet."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _POLL_EVENTS)
    return bool(poll.poll(0))
