"""One client's HTTP/1.1 connection: an ``asyncio.Protocol`` with a queue of requests and one task that answers them.

It is our own because each token passes here (`benchmarks/gateway.py`), and because in front of hardware that costs
money everything that a client can hold needs a bound. Without bounds a client could hold a connection, a handler or a
slot of a node for ever: by a head that never gets complete (slow loris), by a body that hardly moves, by not reading
its answer, by sending requests ahead without end, or by opening more connections than the process may have files. Each
of these has its bound, and each refusal is an answer that says so, without a byte of what the client sent.

What arrives is parsed in ``parser.py`` and paced in ``request_reader.py``; what leaves goes through
``client_writer.py``. The connection has one task while it has requests, which answers them in their order. When the
client leaves, the task is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol, cast

from gpumesh.gateway.http.admission import UNIX_CLIENT, Admission
from gpumesh.gateway.http.answering import call_handler, write_answer, write_response
from gpumesh.gateway.http.body_memory import BodyMemory
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.parser import Event, Refusal, RequestHead
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.request_queue import RequestQueue
from gpumesh.gateway.http.request_reader import RequestReader
from gpumesh.gateway.http.responses import ErrorRenderer, Response
from gpumesh.slice_queue import SliceQueue

log = logging.getLogger(__name__)


class ConnectionState(StrEnum):
    """What becomes of a connection.

    - ``READING``: requests are read and answered.
    - ``DRAINING``: the same, until those that have been read are answered.
    - ``REFUSING``: nothing more is read; what was read is answered, last of all with the refusal.
    - ``LINGERING``: our side has ended; what the client still sends is dropped for a while.
    - ``CLOSING``: both sides have ended; what was written still goes out.
    - ``CLOSED``: the connection is gone.
    """

    READING = "READING"
    DRAINING = "DRAINING"
    REFUSING = "REFUSING"
    LINGERING = "LINGERING"
    CLOSING = "CLOSING"
    CLOSED = "CLOSED"


ENDED = (ConnectionState.LINGERING, ConnectionState.CLOSING, ConnectionState.CLOSED)


class ConnectionServer(Protocol):
    """The server, as far as a connection knows it."""

    handler: Handler
    bounds: Bounds
    memory: BodyMemory
    slices: SliceQueue
    admission: Admission[ClientConnection]
    clock: Callable[[], float]
    render_error: ErrorRenderer

    def admit(self, connection: ClientConnection) -> str | None:
        """The reason why it must go, or ``None``."""

    def register_key(self, connection: ClientConnection, key: str | None) -> str | None:
        """A request with this key is accepted; or the reason why it must be refused."""

    def may_linger(self, connection: ClientConnection) -> bool:
        """Whether a connection that was not admitted may stay until its client has seen the refusal."""

    def forget(self, connection: ClientConnection) -> None:
        """The connection is gone."""


class ClientConnection(asyncio.Protocol):
    """One client's connection. ``writer`` exists once it is made."""

    writer: ClientWriter
    _reader: RequestReader
    _transport: asyncio.Transport

    def __init__(self, server: ConnectionServer, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.bounds = server.bounds
        self.memory = server.memory
        self.slices = server.slices
        self.state = ConnectionState.READING
        self.client_address: str | None = None
        self._server = server
        self._peer = "not connected"
        self._queue = RequestQueue()
        self._task: asyncio.Task[None] | None = None
        self._idle_since = loop.time()
        self._end_timer: asyncio.TimerHandle | None = None  # of an idle connection, then of one that lingers
        self._closed: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<ClientConnection {self._peer} {self.state} {len(self._queue)} queued>"

    # -- called by the transport -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's classes do not inherit from it
        self.client_address, self._peer = _describe_peer(transport)
        self.writer = ClientWriter(transport, self.loop, self.bounds)
        self._reader = RequestReader(self, self._queue, transport, self.slices, self.loop, self.bounds)
        reason = self._server.admit(self)
        if reason is None:
            self._end_timer = self.loop.call_later(self.bounds.keepalive_s, self._check_idle)
            return
        write_response(self.writer, self._server.render_error(503, reason), (("Retry-After", "1"),))
        if self._server.may_linger(self):
            self._linger()
        else:
            self._close()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self.state = ConnectionState.CLOSED
        self._server.forget(self)
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._reader.close()
        self.writer.lose()
        if self._closed is not None:
            self._closed.set_result(None)
        self._queue.end_body(broken=True)
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        del self._transport  # which refers to this connection

    def data_received(self, data: bytes) -> None:
        self._reader.receive(data)

    def pause_writing(self) -> None:
        self.writer.pause()

    def resume_writing(self) -> None:
        self.writer.resume()

    # -- called by the reader ----------------------------------------------------------------------------------------

    def take_events(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, RequestHead):
                self._enqueue(Request(self, event, self._server.clock()))
            elif isinstance(event, bytes):
                if not self._queue.feed_body(event):
                    self._reader.pause()
            elif isinstance(event, Refusal):
                self._refuse(event)
            elif event.whole:
                self._queue.end_body()
            else:
                self._break_body()

    def fail_reading(self) -> None:
        if self._queue.incoming is not None:
            self._break_body()
        else:
            self._refuse(Refusal(400, "this is not HTTP"))

    def time_out_head(self) -> None:
        self._refuse(Refusal(408, "the request's head came too slowly"))

    def _break_body(self) -> None:
        self.state = ConnectionState.REFUSING
        self._reader.stop()
        self._queue.end_body(broken=True)

    def _refuse(self, refusal: Refusal) -> None:
        if self.state in (ConnectionState.READING, ConnectionState.DRAINING):
            self.state = ConnectionState.REFUSING
            self._reader.stop()
            self._enqueue(refusal)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _enqueue(self, item: Request | Refusal) -> None:
        self._queue.add(item)
        if self._task is None:
            self._task = self.loop.create_task(self._answer_queue())
            self._server.admission.mark_busy(self)
        elif self._queue.is_full:
            self._reader.pause()

    async def _answer_queue(self) -> None:
        queue = self._queue
        try:
            while queue.waiting and self.state is not ConnectionState.CLOSED:
                item = queue.pop()
                if self._reader.paused:
                    self._reader.resume()
                if isinstance(item, Refusal):
                    write_response(self.writer, self._server.render_error(item.status, item.message))
                    self._linger()
                    return
                await self._answer(item)
                if self.state in ENDED:
                    return
                if self.writer.backpressured:  # a client that reads no answer gets no other
                    await self.writer.wait_writable()
                if self._reader.paused:  # a handler may have answered without the body that filled the buffer
                    self._reader.resume()
                if queue.waiting:  # a client that sends requests ahead does not keep the others waiting
                    await asyncio.sleep(0)
            if self.state is ConnectionState.DRAINING:
                self._close()
        except ConnectionError:
            self.abort()
        except Exception:
            log.exception("a connection failed inside", extra={"event": "request-failed"})
            self.abort()
        finally:
            self._task = None
            self._idle_since = self.loop.time()
            self._server.admission.mark_idle(self)

    async def _answer(self, request: Request) -> None:
        """Raises ConnectionError when there is no whole answer."""
        answer = await call_handler(self._server.handler, request, self._server.render_error)
        keeps_alive = self.keeps_alive(request)
        if isinstance(answer, Response):
            write_answer(self.writer, answer, request, keep_alive=keeps_alive)
        if not request.body.whole:
            self._linger()
        elif not keeps_alive:
            self._close()

    # -- called by a request -----------------------------------------------------------------------------------------

    def keeps_alive(self, request: Request) -> bool:
        """Whether the connection stays after the answer to this request."""
        return request.keep_alive and self.state is not ConnectionState.DRAINING and request.body.whole

    def resume_reading(self) -> None:
        self._reader.resume()

    def register_key(self, key: str | None) -> str | None:
        return self._server.register_key(self, key)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Ends our side. What the client is still sending is read and dropped for a while: to close the connection
        would reset it, and the reset may overtake the answer."""
        if self.state is ConnectionState.CLOSED:
            return
        self._end(ConnectionState.LINGERING)
        if self._transport.is_closing():
            return
        self._reader.resume()
        try:
            self._transport.write_eof()
        except OSError:  # it has gone in this very moment
            self.abort()
            return
        self.writer.finish()
        self._end_timer = self.loop.call_later(self.bounds.linger_s, self._check_lingering)

    def _close(self) -> None:
        """What was written still goes out. That may take a while, but not for ever."""
        if self.state is not ConnectionState.CLOSED:
            self._end(ConnectionState.CLOSING)
            self._transport.close()
            self.writer.finish()

    def _end(self, state: ConnectionState) -> None:
        """Nothing more is read or written."""
        self.state = state
        self._reader.stop()
        self._queue.clear()
        if self._end_timer is not None:
            self._end_timer.cancel()

    def _check_lingering(self) -> None:
        if self.writer.unsent_bytes:  # and it moves, or the writer would have aborted
            self._end_timer = self.loop.call_later(self.bounds.linger_s, self._check_lingering)
        else:
            self.abort()

    def _check_idle(self) -> None:
        """Runs now and then, so that no request has to start or stop a timer."""
        left_s = self.bounds.keepalive_s - (0.0 if self._busy else self.loop.time() - self._idle_since)
        if left_s > 0.001:
            self._end_timer = self.loop.call_later(left_s, self._check_idle)
        else:
            self.abort()  # a client that has not even taken its last answer by now never will

    @property
    def _busy(self) -> bool:
        return self._task is not None or self._reader.in_head

    def evict(self) -> None:
        """The connection is idle, and another one needs its place."""
        if self.state in ENDED or self.writer.unsent_bytes:
            self.abort()  # otherwise it would stay until its client has taken the rest
        else:
            self._close()

    def close_when_idle(self) -> None:
        """No more requests: an idle connection ends now, another one after its answers."""
        if self.state is ConnectionState.READING:
            self.state = ConnectionState.DRAINING
            if not self._busy:
                self._close()

    async def wait_closed(self) -> None:
        """Waits until it is gone."""
        if self.state is not ConnectionState.CLOSED:
            self._closed = self._closed or self.loop.create_future()
            await asyncio.shield(self._closed)

    def abort(self) -> None:
        if self.state is not ConnectionState.CLOSED:
            self._transport.abort()

    def cancel(self) -> asyncio.Task[None] | None:
        """Ends it at once. Returns the task that is ending, if there is one."""
        task = self._task
        if task is not None:
            task.cancel()
        self.abort()
        return task


def _describe_peer(transport: asyncio.BaseTransport) -> tuple[str | None, str]:
    """The client's address, and a text for a debugger."""
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return peer[0], f"{peer[0]}:{peer[1]}"
    # A client of the Unix socket has no address: asyncio's name for it is "". Where it knows no name it says None.
    return (None, "unknown") if peer is None else (UNIX_CLIENT, UNIX_CLIENT)
