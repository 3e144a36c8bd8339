"""``ClientConnection``: the HTTP/1.1 connection of one client, with a queue of requests and a task that answers them.

The gateway has its own HTTP server for two reasons. Each token passes here, so the server must be fast
(`benchmarks/gateway.py`). And it stands in front of hardware that costs money, so everything that a client can hold
needs a limit. Without limits a client could hold a connection, a handler or a slot of a node forever: with a head that
never becomes complete (slow loris), with a body that hardly moves, by not reading its answer, by sending requests ahead
without end, by opening more connections than the process may have open files.

Each refusal is an answer that names the limit and repeats no byte that the client sent.

``request_reader.py`` paces the incoming bytes, ``parser.py`` parses them, and ``client_writer.py`` writes the outgoing
bytes. One task answers the requests in their order. Between two requests it waits, because asyncio needs 4 us to create
a task. The task is cancelled when the client leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol, cast

from gpumesh.event_loop.slice_queue import SliceQueue
from gpumesh.event_loop.turn_writes import TurnWrites
from gpumesh.gateway.http.admission import Admission, describe_peer
from gpumesh.gateway.http.answering import render_failure, require_complete, write_answer, write_refusal
from gpumesh.gateway.http.bodies.body_memory import BodyMemory
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.parser import Event, Refusal, RequestHead
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.request_queue import RequestQueue
from gpumesh.gateway.http.request_reader import RequestReader
from gpumesh.gateway.http.responses import ErrorRenderer, Response
from gpumesh.gateway.http.streaming_response import StreamingResponse

log = logging.getLogger(__name__)


class ClientConnectionState(StrEnum):
    """The states of a client's connection, in their order; states may be skipped.

    - ``READING``: requests are read and answered.
    - ``DRAINING``: the connection closes as soon as all requests that have been read are answered.
    - ``REFUSING``: nothing more is read. The requests that have been read are answered, then the refusal is sent.
    - ``LINGERING``: our side has ended. The bytes that the client still sends are dropped for a while.
    - ``CLOSING``: both sides have ended. The written bytes still go out.
    - ``CLOSED``: the connection is gone.
    """

    READING = "READING"
    DRAINING = "DRAINING"
    REFUSING = "REFUSING"
    LINGERING = "LINGERING"
    CLOSING = "CLOSING"
    CLOSED = "CLOSED"


# In these states no answer can be written any more.
END_STATES = (ClientConnectionState.LINGERING, ClientConnectionState.CLOSING, ClientConnectionState.CLOSED)


class ConnectionServer(Protocol):
    """The part of the server that a connection uses."""

    handler: Handler
    bounds: Bounds
    memory: BodyMemory
    slices: SliceQueue
    turn_writes: TurnWrites
    admission: Admission[ClientConnection]
    clock: Callable[[], float]
    render_error: ErrorRenderer

    def admit(self, connection: ClientConnection) -> str | None:
        """Returns the reason why the connection must be refused, or ``None`` if it may stay."""

    def register_key(self, connection: ClientConnection, key: str | None) -> str | None:
        """Accepts a request with this key. Returns the reason why the request must be refused, or ``None``."""

    def may_linger(self, connection: ClientConnection) -> bool:
        """Whether a connection that was not admitted may stay until its client has seen the refusal."""

    def forget(self, connection: ClientConnection) -> None:
        """Removes a connection that is gone."""


class ClientConnection(asyncio.Protocol):
    """One client's connection. ``writer`` exists after ``connection_made``.

    A class longer than 250 lines: the transport, the reader and the requests call methods that change one state, and
    every request passes here, so there are few objects.
    """

    writer: ClientWriter
    _reader: RequestReader
    _transport: asyncio.Transport

    def __init__(self, server: ConnectionServer, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.bounds = server.bounds
        self.memory = server.memory
        self.slices = server.slices
        self.state = ClientConnectionState.READING
        self.client_address: str | None = None
        self._server = server
        self._peer = "not connected"  # the client's address, for ``__repr__``
        self.registered_key: str | None = ""  # the key of the last accepted request; "": there was no request
        self._queue = RequestQueue()
        self._task: asyncio.Task[None] | None = None  # answers the requests; begins with the first of them
        self._next_request: asyncio.Future[None] | None = None  # the task waits for it while it has nothing to do
        self._is_answering = False  # a handler works on a request
        self._idle_since = loop.time()
        self._end_timer: asyncio.TimerHandle | None = None  # ends an idle connection, later a lingering one
        self._closed: asyncio.Future[None] | None = None  # made if somebody waits for the close

    def __repr__(self) -> str:
        return f"<ClientConnection {self._peer} {self.state} {len(self._queue)} queued>"

    # -- called by the transport -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks the server whether the connection may stay. If not, sends the refusal and ends the connection."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it
        self.client_address, self._peer = describe_peer(transport)
        self.writer = ClientWriter(transport, self.loop, self.bounds, self._server.turn_writes)
        self._reader = RequestReader(self, self._queue, transport, self.slices, self.loop, self.bounds)
        refusal_reason = self._server.admit(self)
        if refusal_reason is None:
            self._end_timer = self.loop.call_later(self.bounds.keepalive_s, self._check_idle)
            return
        write_refusal(self.writer, self._server.render_error(503, refusal_reason), (("Retry-After", "1"),))
        if self._server.may_linger(self):
            self._linger()
        else:
            self._close()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        """Ends everything that belongs to the connection: its reader, its writer, its requests and its task."""
        self.state = ClientConnectionState.CLOSED
        self._server.forget(self)
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._reader.close()
        self.writer.connection_lost()
        if self._closed is not None:
            self._closed.set_result(None)
        self._queue.end_body(broken=True)
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        del self._transport  # the transport refers to this connection: the garbage collector would have to free both

    def data_received(self, data: bytes) -> None:
        """Passes the bytes to the reader, which parses them and calls ``take_events``."""
        self._reader.receive(data)

    def pause_writing(self) -> None:
        """Begins the back-pressure: the buffer of the transport is full."""
        self.writer.pause()

    def resume_writing(self) -> None:
        """Ends the back-pressure: the client has taken most of the buffer."""
        self.writer.resume()

    # -- called by the reader ----------------------------------------------------------------------------------------

    def take_events(self, events: Sequence[Event]) -> None:
        """Queues the requests, feeds their bodies, and refuses input that is no request."""
        for event in events:
            if isinstance(event, RequestHead):
                self._enqueue(Request(self, event, self._server.clock()))
            elif isinstance(event, bytes):
                if not self._queue.feed_body(event):
                    self._reader.pause()
            elif isinstance(event, Refusal):
                self._refuse(event)
            elif event.whole:  # the end of a whole body: a RequestEnd, as in the last case
                self._queue.end_body()
            else:  # a broken body: its handler refuses the request, and nothing can be read after it
                self._break_body()

    def fail_reading(self) -> None:
        """Ends the reading after a bug of ours: breaks the body that is being read, or refuses the input."""
        if self._queue.incoming is not None:
            self._break_body()
        else:
            self._refuse(Refusal(400, "this is not HTTP"))

    def time_out_head(self) -> None:
        """Refuses a head that was not complete in time."""
        self._refuse(Refusal(408, "the request's head came too slowly"))

    def _break_body(self) -> None:
        """Marks the body that is being read as broken. Nothing after it can be read."""
        self.state = ClientConnectionState.REFUSING
        self._reader.stop()
        self._queue.end_body(broken=True)

    def _refuse(self, refusal: Refusal) -> None:
        """Stops reading, and queues the refusal behind the requests that have been read."""
        if self.state in (ClientConnectionState.READING, ClientConnectionState.DRAINING):
            self.state = ClientConnectionState.REFUSING
            self._reader.stop()
            self._enqueue(refusal)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _enqueue(self, entry: Request | Refusal) -> None:
        """Adds to the queue, and starts or wakes the task that answers the queue if it has nothing to do."""
        self._queue.add(entry)
        if self._is_answering:
            if self._queue.is_full:
                self._reader.pause()
            return
        self._is_answering = True
        self._server.admission.mark_busy(self)
        if self._next_request is None:
            self._task = self.loop.create_task(self._answer_requests())
        elif not self._next_request.done():  # cancelled: the task ends, and so does the connection
            self._next_request.set_result(None)

    def _note_idle(self) -> None:
        """Notes that all requests are answered."""
        self._is_answering, self._idle_since = False, self.loop.time()
        self._server.admission.mark_idle(self)

    async def _answer_requests(self) -> None:
        """Answers the queued requests in their order, and waits for the next, until the connection ends."""
        queue = self._queue
        entry: Request | Refusal | None
        answer: Response | StreamingResponse | None
        try:
            while self.state is not ClientConnectionState.CLOSED:
                if not queue.waiting:
                    if self.state is ClientConnectionState.DRAINING:
                        self._close()
                        return
                    self._note_idle()
                    entry = answer = None  # a client that stays idle must not hold its last request in memory
                    self._next_request = self.loop.create_future()
                    await self._next_request
                    continue
                entry = queue.pop()
                if self._reader.paused:
                    self._reader.resume()
                if isinstance(entry, Refusal):
                    write_refusal(self.writer, self._server.render_error(entry.status, entry.message))
                    self._linger()
                    return
                try:  # not in a coroutine of its own, which would cost time
                    answer = await self._server.handler(entry)
                except (ConnectionError, asyncio.CancelledError) as error:
                    # Its frames refer to the request and to this task, and the task refers to the error: this cycle
                    # would hold the request's body until the garbage collector runs.
                    error.__traceback__ = None
                    raise
                except Exception as error:
                    answer = render_failure(error, self._server.render_error)
                finally:
                    entry.end()
                self._finish_answer(entry, answer)
                if self.state in END_STATES:
                    return
                if self.writer.backpressured:  # a client gets its next answer only after it has read the last one
                    await self.writer.wait_writable()
                if self._reader.paused:  # the handler may have answered without reading the body that filled the buffer
                    self._reader.resume()
                if queue.waiting:  # other clients have their turn between two requests that this one sent ahead
                    await asyncio.sleep(0)
        except ConnectionError:
            self.abort()
        except Exception:
            log.exception("a connection failed inside", extra={"event": "request-failed"})
            self.abort()
        finally:
            self._task = self._next_request = None
            self._note_idle()

    def _finish_answer(self, request: Request, answer: Response | StreamingResponse) -> None:
        """Writes a whole answer (a streamed answer has been written already), and ends a connection that cannot
        stay. Raises ConnectionError if only a part of the answer was sent."""
        require_complete(request, answer)
        keeps_alive = self.keeps_alive(request)
        if isinstance(answer, Response):
            write_answer(self.writer, answer, request, keep_alive=keeps_alive)
        if not request.body.whole:  # the client may still be sending its body
            self._linger()
        elif not keeps_alive:
            self._close()

    # -- called by a request -----------------------------------------------------------------------------------------

    def keeps_alive(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""
        return request.keep_alive and self.state is not ClientConnectionState.DRAINING and request.body.whole

    def resume_reading(self) -> None:
        """Reads on, because the handler has taken the buffered part of the body."""
        self._reader.resume()

    def register_key(self, key: str | None) -> str | None:
        """Accepts a request with this key. Returns the reason why the request must be refused, or ``None``."""
        refusal_reason = self._server.register_key(self, key)
        if refusal_reason is None:
            self.registered_key = key
        return refusal_reason

    # -- the end -----------------------------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Ends our side of the connection. Bytes that the client still sends are read and dropped for a while. To close
        the connection at once would reset it, and the client might see the reset before the answer."""
        if self.state is ClientConnectionState.CLOSED:
            return
        self._enter_end_state(ClientConnectionState.LINGERING)
        if self._transport.is_closing():
            return
        self._reader.resume()
        try:
            self._transport.write_eof()
        except OSError:  # the client has just left
            self.abort()
            return
        self.writer.finish()
        self._end_timer = self.loop.call_later(self.bounds.linger_s, self._check_lingering)

    def _close(self) -> None:
        """Ends both sides. The written bytes still go out; the writer ends a connection that is too slow."""
        if self.state is not ClientConnectionState.CLOSED:
            self._enter_end_state(ClientConnectionState.CLOSING)
            self._transport.close()
            self.writer.finish()

    def _enter_end_state(self, state: ClientConnectionState) -> None:
        """Enters an end state: nothing more is parsed or answered."""
        self.state = state
        self._reader.stop()
        self._queue.clear()
        self.writer.flush()
        if self._end_timer is not None:
            self._end_timer.cancel()

    def _check_lingering(self) -> None:
        """Ends a lingering connection when all bytes for the client have been sent."""
        if self.writer.unsent_bytes:  # the client takes them: otherwise the writer would have aborted
            self._end_timer = self.loop.call_later(self.bounds.linger_s, self._check_lingering)
        else:
            self.abort()

    def _check_idle(self) -> None:
        """Ends a connection that was idle for too long. Runs at intervals: so no request has to set or stop a timer."""
        idle_s = 0.0 if self._is_busy else self.loop.time() - self._idle_since
        remaining_s = self.bounds.keepalive_s - idle_s
        if remaining_s > 0.001:  # a timer may run a moment too early
            self._end_timer = self.loop.call_later(remaining_s, self._check_idle)
        else:
            self.abort()  # a client that has not taken its last answer in this time never will

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered, or a part of a head has come."""
        return self._is_answering or self._reader.in_head

    def evict(self) -> None:
        """Ends this idle connection at once, because another connection needs its place."""
        if self.state in END_STATES or self.writer.unsent_bytes:
            self.abort()  # otherwise the connection would stay until its client has taken the unsent bytes
        else:
            self._close()

    def close_when_idle(self) -> None:
        """Takes no more requests: an idle connection ends now, a busy one after its answers."""
        if self.state is ClientConnectionState.READING:
            self.state = ClientConnectionState.DRAINING
            if not self._is_busy:
                self._close()

    async def wait_closed(self) -> None:
        """Waits until the connection is gone."""
        if self.state is not ClientConnectionState.CLOSED:
            self._closed = self._closed or self.loop.create_future()
            await asyncio.shield(self._closed)

    def abort(self) -> None:
        """Cuts the connection. Bytes that the system does not take at once are lost."""
        if self.state is not ClientConnectionState.CLOSED:
            self.writer.flush()
            self._transport.abort()

    def cancel(self) -> asyncio.Task[None] | None:
        """Cuts the connection, and cancels its task. Returns the task, which is ending, or ``None`` if there is
        none."""
        task = self._task
        if task is not None:
            task.cancel()
        self.abort()
        return task
