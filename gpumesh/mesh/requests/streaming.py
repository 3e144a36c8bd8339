"""An answer that is passed on as it comes, from one node or, where that one is lost, from several."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from gpumesh.backends.base import ServerCounters
from gpumesh.backends.continuation.continuation import Continuation, Ending
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import DeadlineExceeded, GPUMeshError, StreamCut
from gpumesh.mesh.requests.answer import Answer
from gpumesh.mesh.requests.attempt import FailedAttempt, OpenedStream
from gpumesh.mesh.requests.silence_watch import PauseTracker, silence_timeout_s
from gpumesh.slice_queue import FRAME_SLICE_BYTES

DRAIN_S = 1.0  # after the final frame the body's end is waited for, so that the connection can be used again
PAUSE_S = 0.001  # what came within it came together and tells nothing of the server's pace
COUNT_S = 0.2
_NEVER = math.inf


class Failover(Protocol):
    """Knows the other nodes."""

    attempts: int

    def has_other_node(self, node: str) -> bool:
        """Whether any other node could go on with this answer."""

    def slot_is_wanted(self, node: str) -> bool:
        """Whether other requests wait for a slot on this node."""

    async def continue_answer(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        """The stream of the node that goes on, or the answer's end. Raises GPUMeshError when nobody can."""


class StreamingAnswer(Answer):
    """Its place on a node is free as soon as the final frame was seen."""

    def __init__(
        self,
        opened: OpenedStream,
        onward: Failover,
        pauses: PauseTracker,
        *,
        clock: Callable[[], float],
        deadline_in_s: float,
    ) -> None:
        node, response = opened.lease.node, opened.response
        super().__init__(node.name, node.kind, response.status, response.headers)
        self._onward = onward
        self._pauses = pauses
        self._clock = clock
        self._continuation = opened.continuation
        self._over = False
        self._late = False
        self._late_words = "the deadline passed while the answer was on its way"
        self._lost: tuple[Outcome, str] | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.call_later(deadline_in_s, self._deadline_passed)
        self._watchdog: asyncio.TimerHandle | None = None
        self._ready = b""
        self._unread = b""
        self._frames = 0
        self._count_at = 0.0
        self._begin(opened)

    @property
    def counters(self) -> ServerCounters | None:
        return None if self._continuation is None else self._continuation.answer_counters

    def error_frame(self, message: str) -> bytes | None:
        return None if self._continuation is None else self._continuation.error_frame(message)

    def slot_is_wanted(self) -> bool:
        return not self._lease.released and self._onward.slot_is_wanted(self._lease.node.name)

    def _begin(self, opened: OpenedStream) -> None:
        """From now on this node's stream is the answer."""
        self._lease = opened.lease
        self._response = opened.response
        self._ready = opened.first_bytes
        self._unread = opened.unread_bytes
        self._silent = False
        self._waiting_since = _NEVER
        self._longest = 0.0
        self.node = opened.lease.node.name
        if self._late:
            opened.response.abort()
        if self._continuation is not None:
            self._frames += opened.first_bytes.count(self._continuation.frame_separator)
            self._notice(self._continuation)
            if not self._continuation.finished:
                self._watchdog = self._loop.call_later(self._patience_s(), self._look)

    # -- the hot path --------------------------------------------------------------------------------------------

    async def __anext__(self) -> bytes:
        if self._ready:
            ready, self._ready = self._ready, b""
            return ready
        while not self._over:
            if self._lost is not None:
                if out := await self._go_on(*self._lost):
                    return out
                continue
            self._waiting_since = asked = self._clock()
            try:
                if self._unread:
                    await self._response.wait_turn()
                    data, self._unread = self._unread[:FRAME_SLICE_BYTES], self._unread[FRAME_SLICE_BYTES:]
                else:
                    data = await self._response.read()
            except StreamCut as error:
                self._broke(error)
                continue
            except asyncio.CancelledError:
                await self.aclose()
                raise
            now = self._clock()
            self._waiting_since = _NEVER
            if now - asked > self._longest:  # noqa: PLR1730 - a call costs more
                self._longest = now - asked
            continuation = self._continuation
            if not data:
                out = self._body_ended()
            elif continuation is None:
                return data
            else:
                if len(data) > FRAME_SLICE_BYTES:  # may be thousands: between two slices of them others have their turn
                    data, self._unread = data[:FRAME_SLICE_BYTES], data[FRAME_SLICE_BYTES:] + self._unread
                self._frames += data.count(continuation.frame_separator)
                if now > self._count_at:
                    self._count(now)
                out = continuation.feed(data)
                if out is not data:  # by far the most common: passed on as it came, and nothing has happened
                    self._notice(continuation)
            if out:
                return out
        raise StopAsyncIteration

    def _count(self, now: float) -> None:
        """Frames are about as many tokens; told now and then, because the hot path has enough to do."""
        self._lease.node.meter.add(self._frames)
        self._frames = 0
        self._count_at = now + COUNT_S

    def _notice(self, continuation: Continuation) -> None:
        """What frames that were looked at have told."""
        if continuation.finished:
            self._whole()
        elif continuation.cut_reason is not None:
            self._lost = (Outcome.STREAM_ERROR, continuation.cut_reason)

    # -- the end of a stream -------------------------------------------------------------------------------------

    def _whole(self) -> None:
        """The final frame was seen; the rest of the body is of no interest to anybody."""
        assert self._continuation is not None
        lease = self._lease
        self._count(self._clock())
        lease.release(Outcome.SERVED, counters=self._continuation.counters)
        if self._longest > PAUSE_S:
            self._pauses.learn(lease.node.name, lease.model, self._longest)
        self._stop_watching()
        self._deadline.cancel()
        self._deadline = self._loop.call_later(DRAIN_S, self._response.abort)

    def _body_ended(self) -> bytes:
        continuation = self._continuation
        if continuation is None or continuation.finished:
            self._finish(Outcome.SERVED)
            return b""
        out = continuation.finish_body()
        if continuation.finished:
            self._whole()
            self._finish(Outcome.SERVED)
        elif self._lost is None:
            self._lost = (Outcome.CUT, continuation.cut_reason or "the answer ended before its final frame")
        return out

    def _broke(self, error: StreamCut) -> None:
        """Reading failed: the connection is gone, or was closed here (deadline, silence, the tunnel's end)."""
        self._waiting_since = _NEVER
        if self._continuation is not None and self._continuation.finished:
            self._finish(Outcome.SERVED)
        elif self._silent:
            self._lost = (Outcome.TIMED_OUT, f"no token for {self._patience_s():.0f} s")
        elif self._lease.aborted:
            self._lost = (Outcome.UNREACHABLE, "the way to its node was lost")
        else:
            self._lost = (Outcome.CUT, error.message)

    async def _go_on(self, outcome: Outcome, words: str) -> bytes:
        """Another node takes over. Empty when there is nothing for the client yet, or no more."""
        self._lost = None
        self._stop_watching()
        self._count(self._clock())
        self._response.abort()
        if self._late:
            self._finish(Outcome.DEADLINE)
            raise DeadlineExceeded(self._late_words, node=self.node)
        self._lease.release(outcome, error=words)
        if self._continuation is None:
            self._finish(outcome)
            raise StreamCut(words, node=self.node)
        step: OpenedStream | Ending | None = self._continuation.handle_cut(words)
        if step is None:
            step = await self._rest(
                self._continuation, FailedAttempt(self.node, outcome, StreamCut(words, node=self.node))
            )
        if isinstance(step, OpenedStream):
            self.continuations += 1
            self.attempts = self._onward.attempts
            self._begin(step)
            ready, self._ready = self._ready, b""
            return ready
        if step.error is not None:
            self._finish(outcome)
            raise StreamCut(step.error, node=self.node)
        self._finish(Outcome.SERVED)
        return step.data

    async def _rest(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        try:
            return await self._onward.continue_answer(continuation, failed)
        except DeadlineExceeded:
            self._finish(Outcome.DEADLINE)
            raise
        except GPUMeshError as error:
            self._finish(failed.outcome)
            message = f"the answer was cut ({failed.error}) and could not be continued: {error}"
            raise StreamCut(message, node=self.node) from error
        except BaseException:
            self._finish(Outcome.CLIENT_GONE)
            raise

    async def aclose(self) -> None:
        if not self._over:
            self._response.abort()
            whole = self._continuation is not None and self._continuation.finished and not self._ready
            self._finish(Outcome.SERVED if whole else Outcome.CLIENT_GONE)

    def _finish(self, outcome: Outcome) -> None:
        self._over = True
        self._stop_watching()
        self._deadline.cancel()
        self._lease.release(outcome)
        self._ended(outcome)

    # -- timers --------------------------------------------------------------------------------------------------

    def expire(self, words: str) -> None:
        if not self._over:
            self._late_words = words
            self._deadline_passed()

    def _deadline_passed(self) -> None:
        self._late = True
        self._response.abort()

    def _patience_s(self) -> float:
        known = self._pauses.longest_s(self._lease.node.name, self._lease.model)
        if self._longest > PAUSE_S:
            known = max(self._longest, known or 0.0)
        return silence_timeout_s(known)

    def _look(self) -> None:
        """Counts only what was spent waiting for the node: a client that reads slowly makes no silence."""
        patience = self._patience_s()
        waited = self._clock() - self._waiting_since
        if waited >= patience:
            assert self._continuation is not None
            if self._continuation.continuable and self._onward.has_other_node(self._lease.node.name):
                self._silent = True
                self._watchdog = None
                self._response.abort()
                return
            # Nobody else could go on: it may be slow, and if the way to it is dead, its tunnel will find out.
            tunnel = self._lease.node.tunnel
            if tunnel is not None:
                tunnel.suspect(f"no token for {waited:.0f} s")
            waited = 0.0
        self._watchdog = self._loop.call_later(patience - max(waited, 0.0), self._look)

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
