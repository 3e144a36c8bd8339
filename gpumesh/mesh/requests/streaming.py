"""``StreamingAnswer``: an answer that is passed on as it comes, from one node, or from several nodes if one is lost.

Each streamed token is pushed, without a task: the connection to the node calls ``write`` in its ``data_received``. The
request's task waits until the answer ends, or until its node is lost: then it asks another node to continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpumesh.backends.base import ServerCounters
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.balancer.outcomes import SERVER_ERROR_STATUS, ErrorReply, Outcome
from gpumesh.errors import DeadlineExceeded, GPUMeshError, StreamCut
from gpumesh.event_loop.wakeup import Wakeup
from gpumesh.mesh.requests.answer import Answer, ClientStream
from gpumesh.mesh.requests.answer_reading import OpenedStream
from gpumesh.mesh.requests.body_sink import BufferedSink, ByteSink
from gpumesh.mesh.requests.failover import Failover
from gpumesh.mesh.requests.failures import FailedAttempt
from gpumesh.mesh.requests.silence_watch import PauseTracker, SilenceWatch
from gpumesh.mesh.requests.stream_state import StreamState

DRAIN_S = 1.0  # longest wait for the body's end after the final frame: then the connection can be used again
COUNT_S = 0.2  # shortest time between two counts of the tokens: a count for each token would cost more
_FLOWING = StreamState.FLOWING  # each token is compared with it: to read a global is faster than to read a member


class StreamingAnswer(Answer):
    """An answer that streams from a node to a client. Implements ``BodySink`` for the node's stream. Frees the slot on
    the node as soon as the final frame has come. What the methods without a docstring do: see ``Answer``. A long class:
    the node's stream, the client, failover and timers change one state, and each token passes few objects."""

    __slots__ = (
        "_changed",
        "_client",
        "_client_error",
        "_clock",
        "_expiry_message",
        "_failover",
        "_first_bytes",
        "_frames",
        "_lease",
        "_loop",
        "_loss",
        "_next_count_at",
        "_pauses",
        "_reader",
        "_response",
        "_state",
        "_timer",
        "_watch",
        "backpressured",
        "inspects_frames",
        "longest_wait_s",
        "on_writable",
        "waits_since",
    )

    def __init__(
        self,
        opened: OpenedStream,
        failover: Failover,
        pauses: PauseTracker,
        *,
        clock: Callable[[], float],
        deadline_in_s: float,
    ) -> None:
        node, response = opened.lease.node, opened.response
        super().__init__(node.name, node.kind, response.status, response.headers)
        self.on_writable: Callable[[], None] | None = None
        self.backpressured = True  # until a client is attached
        self.inspects_frames = self.consists_of_frames = opened.continuation is not None
        self._failover = failover
        self._pauses = pauses
        self._clock = clock
        self._continuation = opened.continuation  # ``None``: the answer is passed on as it is
        self._state = StreamState.FLOWING
        self._loss = (Outcome.CUT, "")  # in the state LOST: the outcome of the node's stream, and the reason
        self._expiry_message: str | None = None  # set when the deadline has passed
        self._client: ByteSink | None = None
        self._client_error: ConnectionError | None = None  # why nothing can be written to the client
        self._reader: BufferedSink | None = None  # the client, if this answer is iterated
        self._changed = Wakeup()  # wakes the request's task
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(deadline_in_s, self.expire, "the deadline passed while the answer was sent")
        self._next_count_at = 0.0  # when the tokens are counted next, by ``clock``
        self._begin_stream(opened)

    def __repr__(self) -> str:
        held = " backpressured" if self.backpressured else ""
        return f"<StreamingAnswer {self.node} {self._state.name}{held}, {self.continuations} continuations>"

    def slot_is_wanted(self) -> bool:
        return not self._lease.released and self._failover.slot_is_wanted(self._lease.node.name)

    # -- a node's stream, pushed ---------------------------------------------------------------------------------

    def _begin_stream(self, opened: OpenedStream) -> None:
        """Takes the answer from this node's stream from now on."""
        self._lease = opened.lease
        self._response = opened.response
        self._first_bytes = opened.first_bytes
        self._state = StreamState.FLOWING
        self._frames = 0  # how many frames of text have come from this node
        self.node = opened.lease.node.name
        self._watch = SilenceWatch(self._pauses, opened.lease.node, opened.lease.model, self._clock)
        self.waits_since, self.longest_wait_s = self._clock(), 0.0
        if self._expiry_message is not None:  # the deadline passed while this node was found
            self._mark_lost(Outcome.DEADLINE, self._expiry_message)
            return
        if self._continuation is not None:
            self._act_on_frames(self._continuation)
            if self._state is StreamState.FLOWING:
                self._watch.start(self)
        if self._client is not None:
            self._start_pushing()

    def _attach_client(self, client: ByteSink) -> None:
        """Connects the client's stream to this answer, and starts to push the node's stream into it."""
        assert self._client is None, "an answer has one client"
        self._client = client
        client.on_writable = self._resume_stream
        self._start_pushing()

    def _start_pushing(self) -> None:
        """Writes the first bytes of a node's stream to the client, and lets the connection push the rest."""
        first_bytes, self._first_bytes = self._first_bytes, b""
        if first_bytes:
            self._write_to_client(first_bytes)
        self._resume_stream()
        self._response.push_to(self)

    def write(self, data: bytes) -> None:
        """Passes bytes of the node's stream on to the client. Each streamed token passes here."""
        continuation = self._continuation
        if self._state is not _FLOWING:
            return
        if continuation is None:
            self._write_to_client(data)
            return
        now = self._clock()
        if now > self._next_count_at:
            self._count_tokens(now)
        out = continuation.feed(data, now)
        # Text that needs no reading is passed on unchanged (``out is data``). Comments (``: ping``) are no progress.
        if out is data or continuation.progress_at == now:
            if now - self.waits_since > self.longest_wait_s:  # noqa: PLR1730 - a call of max costs more
                self.longest_wait_s = now - self.waits_since
            self.waits_since = now
        if out is not data:
            self._act_on_frames(continuation)
            if not out:
                return
        client = self._client  # ``_write_to_client``, written out here: the call would cost time for each token
        assert client is not None, "the stream is pushed only to a client"
        try:
            client.write(out)
        except ConnectionError as error:
            self._record_client_error(error)
        if client.backpressured:
            self._pause_stream()

    def _write_to_client(self, data: bytes) -> None:
        """Writes to the client. If the client is gone or slow, the node's stream pauses."""
        client = self._client
        assert client is not None, "the stream is pushed only to a client"
        try:
            client.write(data)
        except ConnectionError as error:
            self._record_client_error(error)
        if client.backpressured:
            self._pause_stream()

    def _record_client_error(self, error: ConnectionError) -> None:
        """Pauses the node's stream, because the client is gone. The request's task then raises the error."""
        self._client_error = error.with_traceback(None)  # a traceback's frames would hold this answer: a cycle
        self._pause_stream()

    def _pause_stream(self) -> None:
        """Pauses the node's stream, and wakes the request's task, which waits until the client takes bytes again."""
        self.backpressured = True
        self._lease.note_slow_client()
        self._changed.wake()

    def _resume_stream(self) -> None:
        """Continues the node's stream, because the client's stream takes bytes again."""
        client = self._client
        if client is None or client.backpressured or self._state is StreamState.LOST:
            return
        self.backpressured = False
        self.waits_since = self._clock()
        if self.on_writable is not None:
            self.on_writable()

    def finish(self) -> None:
        """Handles the end of a complete body. If the body has no final frame, the answer was cut nevertheless."""
        if self._state is StreamState.DRAINING:
            self._end_answer(Outcome.SERVED)
            return
        if self._state is not StreamState.FLOWING:
            return
        continuation = self._continuation
        if continuation is None:
            self._end_answer(Outcome.SERVED)
            return
        out = continuation.finish_body()
        if out:
            self._write_to_client(out)
        if continuation.finished:
            self._handle_final_frame(continuation)
            self._end_answer(Outcome.SERVED)
        else:
            self._mark_lost(Outcome.CUT, continuation.cut_reason or "the answer ended before its final frame")

    def fail(self, problem: str) -> None:
        """Handles the end of a body that is not complete: its connection was lost, or closed by this side."""
        if self._state is StreamState.DRAINING:  # the client has the final frame, so nothing is missing
            self._end_answer(Outcome.SERVED)
        elif self._lease.aborted:
            self._mark_lost(Outcome.UNREACHABLE, "the way to its node was lost")
        else:
            self._mark_lost(Outcome.CUT, f"the answer stopped short: {problem}")

    def _act_on_frames(self, continuation: Continuation) -> None:
        """Ends the node's stream if the continuation has just read a final frame or an error frame."""
        if continuation.finished:
            self._handle_final_frame(continuation)
        elif continuation.cut_reason is not None:
            exceeds_bound, reason = continuation.exceeds_bound, continuation.cut_reason
            self._mark_lost(Outcome.TOO_LONG if exceeds_bound else Outcome.STREAM_ERROR, reason)

    def _count_tokens(self, now: float) -> None:
        """Adds the tokens since the last count to the node's meter. ``now`` is the time of ``clock``."""
        if self._continuation is not None:
            count = self._continuation.take_frame_count()
            self._frames += count
            self._lease.node.meter.add(count)
        self._next_count_at = now + COUNT_S

    def _handle_final_frame(self, continuation: Continuation) -> None:
        """Frees the slot, because the final frame has come. The node has ``DRAIN_S`` to end the body: only then the
        connection can be used again."""
        self._state = StreamState.DRAINING
        self._count_tokens(self._clock())
        counters = (continuation.counters or ServerCounters()).with_frame_count(self._frames)
        answer_bytes = continuation.upstream_text_bytes if self._lease.is_learned_from else None
        self._lease.release(Outcome.SERVED, counters=counters, answer_bytes=answer_bytes)
        self._watch.stop()
        self._watch.learn_pace(self)
        self._timer.cancel()
        self._timer = self._loop.call_later(DRAIN_S, self._response.abort)

    def _mark_lost(self, outcome: Outcome, reason: str) -> None:
        """Marks the node's stream as lost. The request's task then asks another node to continue."""
        if self._state is StreamState.FLOWING:
            self._state = StreamState.LOST
            self._loss = (outcome, reason)
            self.backpressured = True  # the rest of the node's stream is not read
            self._watch.stop()
            self._changed.wake()

    def _end_answer(self, outcome: Outcome) -> None:
        """Ends the whole answer with this outcome: frees what it holds, and wakes the request's task."""
        self._state = StreamState.ENDED
        self._watch.stop()
        self._timer.cancel()
        self._lease.release(outcome)
        if self._client is not None:
            self._client.on_writable = None
            self._client = None  # otherwise a cycle: the client's request holds this answer
        self._report_outcome(outcome)
        self._changed.wake()

    # -- the client's side -------------------------------------------------------------------------------------------

    async def send_to(self, client: ClientStream) -> None:
        """Sends the answer to the client, and continues it on another node if it is cut. Returns at its end. Raises the
        client's error if the client has left."""
        self._attach_client(client)
        try:
            while self._state is not StreamState.ENDED:
                if self._client_error is not None:
                    raise self._client_error
                if self._state is StreamState.LOST:
                    await self._fail_over()
                elif client.backpressured:
                    await client.drain(self.slot_is_wanted)
                else:
                    await self._changed.wait()
        except BaseException:  # also a cancellation: the client has left
            await self.aclose()
            raise
        if self._client_error is not None:
            raise self._client_error

    async def __anext__(self) -> bytes:
        reader = self._reader
        if reader is None:
            reader = self._reader = BufferedSink(self._changed)
            if self._state is StreamState.ENDED:  # the answer was closed before its first read
                raise StopAsyncIteration
            self._attach_client(reader)
        try:
            while not reader:
                if self._state is StreamState.ENDED:
                    raise StopAsyncIteration
                if self._state is StreamState.LOST:
                    await self._fail_over()
                else:
                    await reader.wait_changed()
        except asyncio.CancelledError:  # the client has left
            await self.aclose()
            raise
        return reader.take()

    async def aclose(self) -> None:
        if self._state is not StreamState.ENDED:
            # DRAINING: the final frame has been written to the client, if there is a client.
            client_has_everything = self._state is StreamState.DRAINING and self._client is not None
            self._end_answer(Outcome.SERVED if client_has_everything else Outcome.CLIENT_GONE)
            self._response.abort()
        if self._reader is not None:
            self._reader.discard()

    # -- another node takes over -------------------------------------------------------------------------------------

    async def _fail_over(self) -> None:
        """Continues the answer with the stream of another node, or ends the answer. Raises GPUMeshError if the answer
        stays cut."""
        outcome, reason = self._loss
        self._count_tokens(self._clock())
        self._response.abort()
        if self._expiry_message is not None:
            self._end_answer(Outcome.DEADLINE)
            raise DeadlineExceeded(self._expiry_message, node=self.node)
        reply = ErrorReply(SERVER_ERROR_STATUS, reason) if outcome is Outcome.STREAM_ERROR else None
        self._lease.release(outcome, error=reason, reply=reply)
        if self._continuation is None:
            self._end_answer(outcome)
            raise StreamCut(reason, node=self.node)
        failed = FailedAttempt(self.node, outcome, StreamCut(reason, node=self.node))
        for _ in self._continuation.prepare_cut():
            await asyncio.sleep(0)
        rest: OpenedStream | Ending | None = self._continuation.handle_cut(reason)
        if rest is None:
            rest = await self._ask_other_node(self._continuation, failed)
        if isinstance(rest, OpenedStream):
            self.continuations += 1
            self.attempts = self._failover.attempts
            self._begin_stream(rest)
        elif rest.error is not None:
            self._end_answer(outcome)
            raise StreamCut(rest.error, node=self.node)
        else:
            if rest.data:
                self._write_to_client(rest.data)
            self._end_answer(Outcome.SERVED)

    async def _ask_other_node(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        """Returns the stream of the node that continues, or the answer's end. If no node can continue, ends the answer
        and raises GPUMeshError."""
        try:
            return await self._failover.continue_answer(continuation, failed)
        except DeadlineExceeded:
            self._end_answer(Outcome.DEADLINE)
            raise
        except GPUMeshError as error:
            self._end_answer(failed.outcome)
            message = f"the answer was cut ({failed.error}) and could not be continued: {error}"
            raise StreamCut(message, node=self.node) from error
        except BaseException:  # a cancellation: the client has left
            self._end_answer(Outcome.CLIENT_GONE)
            raise

    # -- timers --------------------------------------------------------------------------------------------------

    def expire(self, message: str) -> None:
        if self._state is not StreamState.ENDED:
            self._expiry_message = message
            self._mark_lost(Outcome.DEADLINE, message)
            self._response.abort()

    def handle_silence(self, waited_s: float) -> bool:
        """Handles a silence of the node that is too long. Returns whether the watch continues."""
        message, continuation = f"no token for {waited_s:.0f} s", self._continuation
        assert continuation is not None, "only a stream with generated text is watched"
        if continuation.continuable and self._failover.has_other_node(self.node):
            self._mark_lost(Outcome.TIMED_OUT, message)
            self._response.abort()
            return False
        # No other node could continue the answer, and this node may only be slow. The tunnel finds out if it is dead.
        if (tunnel := self._lease.node.tunnel) is not None:
            tunnel.suspect(message)
        return True
