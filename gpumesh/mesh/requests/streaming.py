"""An answer that is passed on as it comes: from one node, or from several nodes if one is lost.

Each streamed token is pushed: the connection to the node calls ``write`` in its ``data_received``, the continuation
checks the frames, and the client's stream takes the bytes. No task runs for a token. The task of the request only waits
until the answer ends or its node is lost. If the node is lost, the task asks another node to continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from gpumesh.backends.base import ServerCounters
from gpumesh.backends.continuation.continuation import Continuation, Ending
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import DeadlineExceeded, GPUMeshError, StreamCut
from gpumesh.mesh.requests.answer import Answer, ClientStream
from gpumesh.mesh.requests.attempt import FailedAttempt, OpenedStream
from gpumesh.mesh.requests.body_sink import BufferedSink, ByteSink
from gpumesh.mesh.requests.silence_watch import PauseTracker, SilenceWatch
from gpumesh.wakeup import Wakeup

DRAIN_S = 1.0  # longest wait for the body's end after the final frame: then the connection can be used again
COUNT_S = 0.2  # time between two counts of the tokens


class Failover(Protocol):
    """Finds the node that continues an answer."""

    attempts: int

    def has_other_node(self, node: str) -> bool:
        """Whether any other node could continue this answer."""

    def slot_is_wanted(self, node: str) -> bool:
        """Whether other requests wait for a slot on this node."""

    async def continue_answer(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        """The stream of the node that continues, or the answer's end. Raises GPUMeshError if no node can continue."""


class StreamState(Enum):
    """The state of the current node's stream."""

    FLOWING = "flowing"
    DRAINING = "draining"  # the client has the final frame; the body has not ended yet
    LOST = "lost"  # the node failed, and no other node has taken over yet
    ENDED = "ended"


_FLOWING = StreamState.FLOWING  # each token passes here, and to read a global is faster than to read a member


class StreamingAnswer(Answer):
    """Frees its slot on the node as soon as the final frame has come. Implements ``BodySink`` for the node's stream.

    A long class: the node's stream, the client, failover and timers change one state, and a token passes few objects.
    """

    __slots__ = (
        "_changed",
        "_client",
        "_client_error",
        "_clock",
        "_continuation",
        "_count_at",
        "_expired",
        "_failover",
        "_first_bytes",
        "_lease",
        "_loop",
        "_loss",
        "_pauses",
        "_reader",
        "_response",
        "_state",
        "_timer",
        "_watch",
        "backpressured",
        "inspects_frames",
        "on_writable",
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
        self.inspects_frames = opened.continuation is not None
        self._failover = failover
        self._pauses = pauses
        self._clock = clock
        self._continuation = opened.continuation
        self._state = StreamState.FLOWING
        self._loss = (Outcome.CUT, "")
        self._expired: str | None = None
        self._client: ByteSink | None = None
        self._client_error: ConnectionError | None = None
        self._reader: BufferedSink | None = None  # takes the client's place if this answer is iterated
        self._changed = Wakeup()
        self._loop = asyncio.get_running_loop()
        message = "the deadline passed while the answer was on its way"
        self._timer = self._loop.call_later(deadline_in_s, self.expire, message)
        self._count_at = 0.0
        self._begin(opened)

    def __repr__(self) -> str:
        held = " backpressured" if self.backpressured else ""
        return f"<StreamingAnswer {self.node} {self._state.name}{held}, {self.continuations} continuations>"

    @property
    def counters(self) -> ServerCounters | None:
        return None if self._continuation is None else self._continuation.answer_counters

    def error_frame(self, message: str) -> bytes | None:
        return None if self._continuation is None else self._continuation.error_frame(message)

    def slot_is_wanted(self) -> bool:
        return not self._lease.released and self._failover.slot_is_wanted(self._lease.node.name)

    # -- a node's stream, pushed ---------------------------------------------------------------------------------

    def _begin(self, opened: OpenedStream) -> None:
        """From now on the answer comes from this node's stream."""
        self._lease = opened.lease
        self._response = opened.response
        self._first_bytes = opened.first_bytes
        self._state = StreamState.FLOWING
        self.node = opened.lease.node.name
        self._watch = SilenceWatch(self._pauses, self.node, opened.lease.model, self._clock)
        if self._expired is not None:
            self._lose(Outcome.DEADLINE, self._expired)
            return
        if self._continuation is not None:
            self._check_frames(self._continuation)
            if self._state is StreamState.FLOWING:
                self._watch.start(lambda: not self.backpressured, self._handle_silence)
        if self._client is not None:
            self._push_to_client()

    def _attach(self, client: ByteSink) -> None:
        """Connects the client's stream to this answer."""
        assert self._client is None, "an answer has one client"
        self._client = client
        client.on_writable = self._continue_writing
        self._push_to_client()

    def _push_to_client(self) -> None:
        first_bytes, self._first_bytes = self._first_bytes, b""
        if first_bytes:
            self._write_to_client(first_bytes)
        self._continue_writing()
        self._response.push_to(self)

    def write(self, data: bytes) -> None:
        """Each streamed token passes here."""
        continuation = self._continuation
        if self._state is not _FLOWING:
            return
        if continuation is None:
            self._write_to_client(data)
            return
        now, watch = self._clock(), self._watch
        if now - watch.waits_since > watch.longest_s:  # noqa: PLR1730 - a call of max costs more
            watch.longest_s = now - watch.waits_since
        watch.waits_since = now
        if now > self._count_at:
            self._count_tokens(now)
        out = continuation.feed(data, now)
        if out is not data:  # most often both are one object: text that needs no reading is passed on as it is
            self._check_frames(continuation)
            if not out:
                return
        client = self._client
        assert client is not None
        try:
            client.write(out)
        except ConnectionError as error:
            self._lose_client(error)
        if client.backpressured:
            self._pause()

    def _write_to_client(self, data: bytes) -> None:
        client = self._client
        assert client is not None
        try:
            client.write(data)
        except ConnectionError as error:
            self._lose_client(error)
        if client.backpressured:
            self._pause()

    def _lose_client(self, error: ConnectionError) -> None:
        self._client_error = error.with_traceback(None)  # a traceback's frames would hold this answer: a cycle
        self._pause()

    def _pause(self) -> None:
        """Pauses the node's stream until the client's stream takes bytes again. The request's task waits for that."""
        self.backpressured = True
        self._changed.wake()

    def _continue_writing(self) -> None:
        """Continues the node's stream, because the client's stream takes bytes again."""
        if self._client is not None and not self._client.backpressured and self._state is not StreamState.LOST:
            self.backpressured = False
            self._watch.waits_since = self._clock()
            if self.on_writable is not None:
                self.on_writable()

    def finish(self) -> None:
        """The node's connection calls this when the body is complete."""
        continuation = self._continuation
        if self._state is StreamState.DRAINING or (continuation is None and self._state is StreamState.FLOWING):
            self._end(Outcome.SERVED)
        elif self._state is StreamState.FLOWING and continuation is not None:
            out = continuation.finish_body()
            if out:
                self._write_to_client(out)
            if continuation.finished:
                self._complete(continuation)
                self._end(Outcome.SERVED)
            else:
                self._lose(Outcome.CUT, continuation.cut_reason or "the answer ended before its final frame")

    def fail(self, problem: str) -> None:
        """The node's connection calls this when it is lost, or was closed by this side."""
        if self._state is StreamState.DRAINING:
            self._end(Outcome.SERVED)
        elif self._lease.aborted:
            self._lose(Outcome.UNREACHABLE, "the way to its node was lost")
        else:
            self._lose(Outcome.CUT, f"the answer stopped short: {problem}")

    def _check_frames(self, continuation: Continuation) -> None:
        """Acts on the result after the continuation has read frames."""
        if continuation.finished:
            self._complete(continuation)
        elif continuation.cut_reason is not None:
            self._lose(Outcome.STREAM_ERROR, continuation.cut_reason)

    def _count_tokens(self, now: float) -> None:
        """Counts the new tokens. It is called now and then, because a call for each token would cost more."""
        if self._continuation is not None:
            self._lease.node.meter.add(self._continuation.take_frame_count())
        self._count_at = now + COUNT_S

    def _complete(self, continuation: Continuation) -> None:
        """The final frame has come. The rest of the body holds nothing for the client, but the connection can be used
        again only if the body ends. So the node has ``DRAIN_S`` to end it."""
        self._state = StreamState.DRAINING
        self._count_tokens(self._clock())
        self._lease.release(Outcome.SERVED, counters=continuation.counters)
        self._watch.stop()
        self._watch.learn_pace()
        self._timer.cancel()
        self._timer = self._loop.call_later(DRAIN_S, self._response.abort)

    def _lose(self, outcome: Outcome, reason: str) -> None:
        """Marks the node as failed. The task that waits for this answer then asks another node."""
        if self._state is StreamState.FLOWING:
            self._state = StreamState.LOST
            self._loss = (outcome, reason)
            self.backpressured = True  # the rest of the node's stream is not read
            self._watch.stop()
            self._changed.wake()

    def _end(self, outcome: Outcome) -> None:
        self._state = StreamState.ENDED
        self._watch.stop()
        self._timer.cancel()
        self._lease.release(outcome)
        if self._client is not None:
            self._client.on_writable = None
            self._client = None  # the client's request holds this answer: without this, a cycle
        self._report_outcome(outcome)
        self._changed.wake()

    # -- the client's side -------------------------------------------------------------------------------------------

    async def send_to(self, client: ClientStream) -> None:
        self._attach(client)
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
        except BaseException:
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
            self._attach(reader)
        try:
            while not reader:
                if self._state is StreamState.ENDED:
                    raise StopAsyncIteration
                if self._state is StreamState.LOST:
                    await self._fail_over()
                else:
                    await reader.wait_changed()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        return reader.take()

    async def aclose(self) -> None:
        if self._state is not StreamState.ENDED:
            client_has_all = self._state is StreamState.DRAINING and self._client is not None
            self._end(Outcome.SERVED if client_has_all else Outcome.CLIENT_GONE)
            self._response.abort()
        if self._reader is not None:
            self._reader.discard()

    # -- another node takes over -------------------------------------------------------------------------------------

    async def _fail_over(self) -> None:
        """Ends the answer, or continues it with the stream of another node. Raises GPUMeshError if the answer stays
        cut."""
        outcome, reason = self._loss
        self._count_tokens(self._clock())
        self._response.abort()
        if self._expired is not None:
            self._end(Outcome.DEADLINE)
            raise DeadlineExceeded(self._expired, node=self.node)
        self._lease.release(outcome, error=reason)
        if self._continuation is None:
            self._end(outcome)
            raise StreamCut(reason, node=self.node)
        failed = FailedAttempt(self.node, outcome, StreamCut(reason, node=self.node))
        step: OpenedStream | Ending | None = self._continuation.handle_cut(reason)
        if step is None:
            step = await self._ask_other_node(self._continuation, failed)
        if isinstance(step, OpenedStream):
            self.continuations += 1
            self.attempts = self._failover.attempts
            self._begin(step)
        elif step.error is not None:
            self._end(outcome)
            raise StreamCut(step.error, node=self.node)
        else:
            if step.data:
                self._write_to_client(step.data)
            self._end(Outcome.SERVED)

    async def _ask_other_node(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        try:
            return await self._failover.continue_answer(continuation, failed)
        except DeadlineExceeded:
            self._end(Outcome.DEADLINE)
            raise
        except GPUMeshError as error:
            self._end(failed.outcome)
            message = f"the answer was cut ({failed.error}) and could not be continued: {error}"
            raise StreamCut(message, node=self.node) from error
        except BaseException:
            self._end(Outcome.CLIENT_GONE)
            raise

    # -- timers --------------------------------------------------------------------------------------------------

    def expire(self, message: str) -> None:
        if self._state is not StreamState.ENDED:
            self._expired = message
            self._lose(Outcome.DEADLINE, message)
            self._response.abort()

    def _handle_silence(self, waited_s: float) -> bool:
        """Acts on a silence of the node that is too long. Returns whether the watch continues."""
        message = f"no token for {waited_s:.0f} s"
        continuation = self._continuation
        assert continuation is not None
        if continuation.continuable and self._failover.has_other_node(self.node):
            self._lose(Outcome.TIMED_OUT, message)
            self._response.abort()
            return False
        # No other node could continue: this one may only be slow. If its connection is dead, the tunnel will notice.
        tunnel = self._lease.node.tunnel
        if tunnel is not None:
            tunnel.suspect(message)
        return True
