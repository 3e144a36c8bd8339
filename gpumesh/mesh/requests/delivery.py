"""``RequestDelivery`` delivers one request: it tries node after node until one answers. If a node is lost while its
answer streams, it tries the other nodes for the rest of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random

from msgspec.structs import replace

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import Continuation, Ending
from gpumesh.backends.continuation.planner import ContinuationStrategies
from gpumesh.backends.dialects import kinds_that_continue
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import (
    MAX_ROUNDS,
    MAX_SERVER_FAILURES,
    SERVER_ERROR_STATUS,
    Outcome,
    is_retryable,
    retry_delay_s,
    rule_for_outcome,
)
from gpumesh.errors import BackendStatus, DeadlineExceeded, GPUMeshError, NoNodeError
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.mesh.requests.attempt import FailedAttempt, OpenedStream, ask_node, run_attempt
from gpumesh.mesh.requests.silence_watch import PauseTracker
from gpumesh.mesh.requests.streaming import StreamingAnswer
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.topology import BackendKind

# Time for a node to render a prompt, which shows how its model continues an answer: the node may have to load the
# model.
RENDER_TIMEOUT_S = 60.0
# After this time the mesh knows whether the server or the tunnel ended a connection: a failed tunnel is down by then.
TUNNEL_SETTLE_S = 0.5
# If a connection ended sooner than both of these (seconds; round trips), it may never have reached a server.
MIN_SERVER_S, MIN_SERVER_RTTS = 0.05, 4.0


@dataclass(frozen=True, slots=True)
class SendContext:
    """The objects that all requests of a mesh share. ``explain_no_node`` makes the error that explains why no node can
    serve a request."""

    upstream: Upstream
    dispatcher: Dispatcher
    clock: Callable[[], float]
    rng: Random
    explain_no_node: Callable[[Demand], GPUMeshError]
    strategies: ContinuationStrategies = field(default_factory=dict)
    pauses: PauseTracker = field(default_factory=PauseTracker)


class RequestDelivery:
    """``calls`` holds the request in the form for each kind of server. ``resume``: another node may continue a cut
    answer. ``at_most_once``: the request is not sent again after a server may have begun to work on it.

    Implements ``streaming.Failover``.
    """

    def __init__(
        self,
        context: SendContext,
        demand: Demand,
        calls: Mapping[BackendKind, HttpCall],
        *,
        timeout_s: float,
        resume: bool,
        at_most_once: bool = False,
        try_reserve_memory: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._context = context
        self._demand = demand
        self._calls = calls
        self._resume = resume
        self._at_most_once = at_most_once
        self._try_reserve_memory = try_reserve_memory
        self._started_at = context.clock()
        self._deadline = self._started_at + timeout_s
        self._exclude: frozenset[str] = frozenset()
        self._failures: list[FailedAttempt] = []
        self._rounds = 1
        self._waited_s = 0.0
        self.attempts = 0

    def __repr__(self) -> str:
        failed = ", ".join(f"{failure.node} {failure.outcome.value}" for failure in self._failures) or "none"
        return f"<RequestDelivery model {self._demand.model} attempt {self.attempts} failed: {failed}>"

    async def deliver(self) -> Answer:
        """Returns the answer of the first node that gives one. Raises NoNodeError, ModelMissing, QueueFull and
        DeadlineExceeded."""
        while True:
            lease = None if self._failures else self._context.dispatcher.acquire_now(self._demand, self._exclude)
            if lease is None:
                lease = await self._acquire_lease()
            if lease is None:
                return self._with_history(self._last_error_answer())
            call = self._calls[lease.node.kind]
            result = await self._attempt(lease, call, partial(self._new_continuation, call))
            if isinstance(result, FailedAttempt):
                self._record_failure(result)
                if await self._request_breaks_servers():
                    return self._with_history(self._last_error_answer())
            elif isinstance(result, OpenedStream):
                return self._with_history(self._streaming_answer(result))
            else:
                return self._with_history(result)

    def _new_continuation(self, call: HttpCall) -> Continuation:
        """The ``Continuation`` of a new stream. It is made before the first byte, because it must see every byte that
        the client gets."""
        return Continuation(
            call.path,
            call.body,
            clock=self._context.clock,
            strategies=self._context.strategies,
            resume=self._resume,
            started_at=self._started_at,
            reserve_bytes=self._try_reserve_memory,
        )

    def _streaming_answer(self, opened: OpenedStream) -> StreamingAnswer:
        # A server of another API could not continue this stream: its frames look different.
        self._demand = replace(self._demand, kinds=self._demand.kinds & kinds_that_continue(opened.lease.node.kind))
        clock = self._context.clock
        remaining_s = max(self._deadline - clock(), 0.0)
        return StreamingAnswer(opened, self, self._context.pauses, clock=clock, deadline_in_s=remaining_s)

    def _with_history(self, answer: Answer) -> Answer:
        answer.attempts = self.attempts
        answer.queue_ms = self._waited_s * 1000.0
        return answer

    # -- continuing a cut stream ---------------------------------------------------------------------------------

    def has_other_node(self, node: str) -> bool:
        return self._context.dispatcher.could_serve(self._demand, exclude=frozenset({node}))

    def slot_is_wanted(self, node: str) -> bool:
        return self._context.dispatcher.slot_is_wanted(node)

    async def continue_answer(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        self._failures, self._exclude, self._rounds = [failed], frozenset({failed.node}), 1
        while True:
            lease = await self._acquire_lease()
            if lease is None:
                raise self._all_failed_error()
            result = await self._continue_on(lease, continuation)
            if not isinstance(result, FailedAttempt):
                return result
            self._record_failure(result)
            if await self._request_breaks_servers():
                raise self._all_failed_error()

    async def _continue_on(self, lease: Lease, continuation: Continuation) -> OpenedStream | Ending | FailedAttempt:
        """Asks this node for the rest of the answer, unless nothing is left to ask for."""
        step = await self._next_call(lease, continuation)
        if isinstance(step, Ending):
            lease.discard()
            return step
        if isinstance(step, FailedAttempt):
            return step
        headers = self._calls[lease.node.kind].headers
        call = replace(step, headers=headers) if headers else step
        result = await self._attempt(lease, call, lambda: continuation)
        if isinstance(result, OpenedStream):
            return result
        continuation.abandon_upstream()
        return result if isinstance(result, FailedAttempt) else _refused_continuation(result)

    async def _next_call(self, lease: Lease, continuation: Continuation) -> HttpCall | Ending | FailedAttempt:
        """The request to this node. If it depends on the model's template, the node is asked to render the prompt
        first."""
        node, kind = lease.node.name, lease.node.kind
        question = continuation.render_call(node, kind)
        if question is not None:
            timeout_s = min(RENDER_TIMEOUT_S, self._deadline - self._context.clock())
            reply = await ask_node(self._context.upstream, lease, question, timeout_s=timeout_s)
            if isinstance(reply, FailedAttempt):
                return reply
            continuation.apply_rendered_prompt(node, *reply)
        step = continuation.next_call(node, kind)
        if step is None:
            lease.discard()
            return FailedAttempt(
                node, Outcome.CANNOT_CONTINUE, NoNodeError("it does not say how its model goes on", node=node)
            )
        return step

    # -- attempts ------------------------------------------------------------------------------------------------

    def _attempt(
        self, lease: Lease, call: HttpCall, continuation: Callable[[], Continuation]
    ) -> Awaitable[WholeAnswer | OpenedStream | FailedAttempt]:
        self.attempts += 1
        context = self._context
        lease.can_move = lambda: context.dispatcher.could_serve(self._demand, exclude=self._exclude | {lease.node.name})
        return run_attempt(
            context.upstream,
            lease,
            call,
            timeout_s=self._deadline - context.clock(),
            continuation=continuation,
            at_most_once=self._at_most_once,
        )

    def _record_failure(self, failed: FailedAttempt) -> None:
        """Records the failure, so that the next attempt goes to another node. Raises the failure if another node could
        not do better, or must not get the request."""
        self._failures.append(failed)
        may_have_run = self._at_most_once and failed.request_sent and failed.answer is None
        if may_have_run or not rule_for_outcome(failed.outcome).fail_over:
            raise _copy_error(failed.error) from failed.error.__cause__
        self._exclude |= {failed.node}

    async def _request_breaks_servers(self) -> bool:
        """Whether the request itself may make servers fail: two servers have answered it with 500, or ended the
        connection while they worked on it. Then no other node is asked, and the failures do not count against the
        nodes."""
        if sum(_failed_at_request(failed) for failed in self._failures) < MAX_SERVER_FAILURES:
            return False
        if any(_lost_over_ssh(failed) for failed in self._failures):
            await asyncio.sleep(TUNNEL_SETTLE_S)
        suspects = [failed for failed in self._failures if _is_server_failure(failed)]
        if len(suspects) < MAX_SERVER_FAILURES:
            return False
        for failed in suspects:
            if self._demand.needs_slot and failed.lease is not None and failed.lease.node.reachable:
                failed.lease.node.forgive_failure()
        return True

    # -- leases --------------------------------------------------------------------------------------------------

    async def _acquire_lease(self) -> Lease | None:
        """A slot on a node that has not failed at this request, or that may succeed after a pause.

        ``None`` if there is no such node left. As long as no attempt has failed, it raises the errors of
        ``Dispatcher.acquire`` instead."""
        while True:
            lease = self._acquire_despite_breaker()
            if lease is not None:
                return lease
            asked_at = self._context.clock()
            try:
                lease = await self._context.dispatcher.acquire(
                    self._demand,
                    exclude=self._exclude,
                    timeout_s=self._deadline - asked_at,
                    since=self._started_at if self._failures else None,
                )
            except NoNodeError:
                if not self._failures:
                    raise self._context.explain_no_node(self._demand) from None
                if not await self._start_next_round():
                    return None
                continue
            self._waited_s += self._context.clock() - asked_at
            return lease

    def _acquire_despite_breaker(self) -> Lease | None:
        """A slot on a node with an open breaker, if the last failure was a server's error and no other node is left. An
        attempt there is better than to return the error."""
        if not self._failures or self._failures[-1].outcome is not Outcome.SERVER_ERROR:
            return None
        dispatcher = self._context.dispatcher
        if dispatcher.could_serve(self._demand, exclude=self._exclude):
            return None
        return dispatcher.acquire_despite_breaker(self._demand, exclude=self._exclude)

    async def _start_next_round(self) -> bool:
        """Call this when every node has failed. After a pause, the nodes whose last failure may be over can be asked
        again.

        False if there is no such node. Raises DeadlineExceeded if the pause would last until the deadline."""
        last_outcomes = {failed.node: failed.outcome for failed in self._failures}
        retryable = frozenset(node for node, outcome in last_outcomes.items() if is_retryable(outcome))
        if not retryable & self._exclude or self._rounds >= MAX_ROUNDS:
            return False
        pause_s = retry_delay_s(self._rounds, self._context.rng)
        if self._context.clock() + pause_s >= self._deadline:
            raise DeadlineExceeded("the deadline passed while no node could serve this") from None
        await asyncio.sleep(pause_s)
        self._rounds += 1
        self._exclude -= retryable
        return True

    # -- when every node has failed ------------------------------------------------------------------------------

    def _last_error_answer(self) -> Answer:
        """The last error answer of a server. Raises NoNodeError if no server answered."""
        for failed in reversed(self._failures):
            if failed.answer is not None:
                return failed.answer
        raise self._all_failed_error()

    def _all_failed_error(self) -> NoNodeError:
        last_messages = {failed.node: failed.error.message for failed in self._failures}
        reasons = "; ".join(f"{node}: {message}" for node, message in last_messages.items())
        if sum(_is_server_failure(failed) for failed in self._failures) >= MAX_SERVER_FAILURES:
            hint = "it may be the request itself that makes them fail"
            return NoNodeError(f"two servers failed at this request, so no other was asked ({reasons})", hint=hint)
        return NoNodeError(f"every node that could serve this has failed it ({reasons})")


def _copy_error(error: GPUMeshError) -> GPUMeshError:
    """A copy of the error to raise. To raise the original would form a cycle: its traceback's frames hold the failures,
    and these hold the error. Only the garbage collector would free them."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


def _failed_at_request(failed: FailedAttempt) -> bool:
    """Whether the server seems to have failed at this request. Whether the tunnel ended the connection is not checked
    here."""
    if failed.lease is None or failed.lease.aborted:
        return False
    if failed.answer is not None:
        return failed.answer.status == SERVER_ERROR_STATUS
    return failed.request_sent and failed.outcome in (Outcome.UNREACHABLE, Outcome.CUT)


def _lost_over_ssh(failed: FailedAttempt) -> bool:
    """Whether the connection went through a tunnel and ended without an answer: the tunnel may have ended it."""
    return failed.answer is None and failed.lease is not None and failed.lease.node.uses_ssh


def _is_server_failure(failed: FailedAttempt) -> bool:
    """Whether the server failed at this request, and not the tunnel to it.

    A server that did not run before the request does not count. Through a tunnel this looks similar: the connection to
    the local port is made, and then ends. But it ends at once."""
    if not _failed_at_request(failed) or failed.lease is None:
        return False
    if not _lost_over_ssh(failed):
        return True
    node = failed.lease.node
    at_once_s = max(MIN_SERVER_S, MIN_SERVER_RTTS * (node.tunnel_state.rtt_ms or 0.0) / 1000.0)
    return node.is_same_connection(failed.lease) and (node.reachable or failed.duration_s > at_once_s)


def _refused_continuation(answer: WholeAnswer) -> FailedAttempt:
    """The failure of a node that was asked for the rest of an answer, and sent a whole answer instead of a stream: it
    does not understand the request."""
    error = BackendStatus(f"it answered {answer.status} to the rest of an answer", status=answer.status)
    return FailedAttempt(answer.node, Outcome.CANNOT_CONTINUE, error, answer)
