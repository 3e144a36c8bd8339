"""One request on its way through the mesh: node after node, until one answers; and again when that one is lost while
its answer is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import Continuation, ContinuationStrategies, Ending
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
from gpumesh.mesh.nodes.node import Lease
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.mesh.requests.attempt import FailedAttempt, OpenedStream, ask_node, run_attempt
from gpumesh.mesh.requests.silence_watch import PauseTracker
from gpumesh.mesh.requests.streaming import StreamingAnswer
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.topology import BackendKind

# How long a node may think about how its model continues an answer: it may have to load the model first.
QUESTION_S = 60.0
# Until it shows whether a connection was ended by the server or by the tunnel that carried it.
SETTLE_S = 0.5
# A connection that ended sooner than this, or than a few round trips, may never have reached a server.
AT_ONCE_S, AT_ONCE_RTTS = 0.05, 4.0


@dataclass(frozen=True, slots=True)
class SendContext:
    """What all requests of a mesh share. ``explain_no_node`` says why nobody can serve a demand."""

    upstream: Upstream
    dispatcher: Dispatcher
    clock: Callable[[], float]
    rng: Random
    explain_no_node: Callable[[Demand], GPUMeshError]
    strategies: ContinuationStrategies = field(default_factory=dict)
    pauses: PauseTracker = field(default_factory=PauseTracker)


class RequestDelivery:
    """``calls`` holds the request as each kind of server wants it; ``resume``: another node may continue a cut answer;
    ``once``: it is never given to a server again that may have begun to work on it.

    Implements ``streaming.Onward``.
    """

    def __init__(
        self,
        means: SendContext,
        demand: Demand,
        calls: Mapping[BackendKind, HttpCall],
        *,
        timeout_s: float,
        resume: bool,
        at_most_once: bool = False,
        try_reserve_memory: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._means = means
        self._demand = demand
        self._calls = calls
        self._resume = resume
        self._once = at_most_once
        self._hold = try_reserve_memory
        self._began = means.clock()
        self._deadline = self._began + timeout_s
        self._exclude: frozenset[str] = frozenset()
        self._failures: list[FailedAttempt] = []
        self._rounds = 1
        self._waited_s = 0.0
        self.attempts = 0

    async def deliver(self) -> Answer:
        """Raises NoNodeError, ModelMissing, QueueFull and DeadlineExceeded."""
        while True:
            lease = await self._place()
            if lease is None:
                return self._told(self._last_words())
            call = self._calls[lease.node.kind]

            def continuation(call: HttpCall = call) -> Continuation:
                means = self._means
                return Continuation(
                    call.path,
                    call.body,
                    clock=means.clock,
                    strategies=means.strategies,
                    resume=self._resume,
                    started_at=self._began,
                    reserve_bytes=self._hold,
                )

            result = await self._attempt(lease, call, continuation)
            if isinstance(result, FailedAttempt):
                self._note(result)
                if await self._request_ends_servers():
                    return self._told(self._last_words())
            elif isinstance(result, OpenedStream):
                return self._told(self._streaming(result))
            else:
                return self._told(result)

    def _streaming(self, opened: OpenedStream) -> StreamingAnswer:
        # A server of another API could not go on with it: its stream is of another form.
        self._demand = replace(self._demand, kinds=self._demand.kinds & kinds_that_continue(opened.lease.node.kind))
        clock = self._means.clock
        left_s = max(self._deadline - clock(), 0.0)
        return StreamingAnswer(opened, self, self._means.pauses, clock=clock, deadline_in_s=left_s)

    def _told(self, answer: Answer) -> Answer:
        answer.attempts = self.attempts
        answer.queue_ms = self._waited_s * 1000.0
        return answer

    # -- continuing ----------------------------------------------------------------------------------------------

    def has_other_node(self, node: str) -> bool:
        return self._means.dispatcher.could_serve(self._demand, exclude=frozenset({node}))

    def slot_is_wanted(self, node: str) -> bool:
        return self._means.dispatcher.slot_is_wanted(node)

    async def continue_answer(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        self._failures, self._exclude, self._rounds = [failed], frozenset({failed.node}), 1
        while True:
            lease = await self._place()
            if lease is None:
                raise self._all_failed()
            step = await self._next_call(lease, continuation)
            if isinstance(step, Ending):
                lease.discard()
                return step
            if isinstance(step, HttpCall):
                headers = self._calls[lease.node.kind].headers
                call = replace(step, headers=headers) if headers else step
                result = await self._attempt(lease, call, lambda: continuation)
                if isinstance(result, OpenedStream):
                    return result
                step = result if isinstance(result, FailedAttempt) else _refused(result)
                continuation.abandon_upstream()
            self._note(step)
            if await self._request_ends_servers():
                raise self._all_failed()

    async def _next_call(self, lease: Lease, continuation: Continuation) -> HttpCall | Ending | FailedAttempt:
        """What to send to this node; where it depends on the model's template, the node is asked about that first."""
        node, kind = lease.node.name, lease.node.kind
        question = continuation.render_call(node, kind)
        if question is not None:
            timeout_s = min(QUESTION_S, self._deadline - self._means.clock())
            told = await ask_node(self._means.upstream, lease, question, timeout_s=timeout_s)
            if isinstance(told, FailedAttempt):
                return told
            continuation.apply_rendered_prompt(node, *told)
        step = continuation.next_call(node, kind)
        if step is None:
            lease.discard()
            return FailedAttempt(
                node, Outcome.CANNOT_CONTINUE, NoNodeError("it does not say how its model goes on", node=node)
            )
        return step

    # -- attempts ------------------------------------------------------------------------------------------------

    async def _attempt(
        self, lease: Lease, call: HttpCall, continuation: Callable[[], Continuation]
    ) -> WholeAnswer | OpenedStream | FailedAttempt:
        self.attempts += 1
        lease.can_move = lambda: self._means.dispatcher.could_serve(
            self._demand, exclude=self._exclude | {lease.node.name}
        )
        left_s = self._deadline - self._means.clock()
        return await run_attempt(
            self._means.upstream, lease, call, timeout_s=left_s, continuation=continuation, at_most_once=self._once
        )

    def _note(self, failed: FailedAttempt) -> None:
        """The next try goes elsewhere. Raises the failure where another node could not do better."""
        self._failures.append(failed)
        if not rule_for_outcome(failed.outcome).fail_over or (
            self._once and failed.request_sent and failed.answer is None
        ):
            raise _copy_of(failed.error) from failed.error.__cause__
        self._exclude |= {failed.node}

    async def _request_ends_servers(self) -> bool:
        """Whether it may be the request itself at which servers fail: two have answered it with 500, or ended the
        connection in the midst of it. Then no other is asked, and it counts against none of them."""
        if sum(_at_request(failed) for failed in self._failures) < MAX_SERVER_FAILURES:
            return False
        if any(_over_tunnel(failed) for failed in self._failures):
            await asyncio.sleep(SETTLE_S)
        suspects = [failed for failed in self._failures if _by_server(failed)]
        if len(suspects) < MAX_SERVER_FAILURES:
            return False
        for failed in suspects:
            if self._demand.needs_slot and failed.lease is not None and failed.lease.node.reachable:
                failed.lease.node.forgive_failure()
        return True

    async def _place(self) -> Lease | None:
        """A place on a node that has not failed this request yet, or that may do better in a moment; ``None`` when
        there is none left. Raises what ``Dispatcher.acquire`` raises while nothing has failed."""
        while True:
            asked = self._means.clock()
            if self._failures and self._failures[-1].outcome is Outcome.SERVER_ERROR:
                dispatcher = self._means.dispatcher
                if not dispatcher.could_serve(self._demand, exclude=self._exclude):
                    lease = dispatcher.acquire_despite_breaker(self._demand, exclude=self._exclude)
                    if lease is not None:
                        return lease
            since = self._began if self._failures else None
            try:
                lease = await self._means.dispatcher.acquire(
                    self._demand, exclude=self._exclude, timeout_s=self._deadline - asked, since=since
                )
            except NoNodeError:
                if not self._failures:
                    raise self._means.explain_no_node(self._demand) from None
                last = {failed.node: failed.outcome for failed in self._failures}
                again = frozenset(node for node, outcome in last.items() if is_retryable(outcome))
                if not again & self._exclude or self._rounds >= MAX_ROUNDS:
                    return None
                pause = retry_delay_s(self._rounds, self._means.rng)
                if self._means.clock() + pause >= self._deadline:
                    raise DeadlineExceeded("the deadline passed while no node could serve this") from None
                await asyncio.sleep(pause)
                self._rounds += 1
                self._exclude -= again
                continue
            self._waited_s += self._means.clock() - asked
            return lease

    def _last_words(self) -> Answer:
        """Everybody failed: the server's own words if any gave some. Raises NoNodeError if none did."""
        for failed in reversed(self._failures):
            if failed.answer is not None:
                return failed.answer
        raise self._all_failed()

    def _all_failed(self) -> NoNodeError:
        last = {failed.node: failed.error.message for failed in self._failures}
        told = "; ".join(f"{node}: {message}" for node, message in last.items())
        if sum(_by_server(failed) for failed in self._failures) >= MAX_SERVER_FAILURES:
            hint = "it may be the request itself that makes them fail"
            return NoNodeError(f"two servers failed at this request, so no other was asked ({told})", hint=hint)
        return NoNodeError(f"every node that could serve this has failed it ({told})")


def _copy_of(error: GPUMeshError) -> GPUMeshError:
    """To be raised: its frames hold the failures, and would hold themselves by them until garbage is collected."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


def _at_request(failed: FailedAttempt) -> bool:
    """Whether the server, as far as can be seen at once, failed at this very request."""
    if failed.lease is None or failed.lease.aborted:
        return False
    if failed.answer is not None:
        return failed.answer.status == SERVER_ERROR_STATUS
    return failed.request_sent and failed.outcome in (Outcome.UNREACHABLE, Outcome.CUT)


def _over_tunnel(failed: FailedAttempt) -> bool:
    return failed.answer is None and failed.lease is not None and failed.lease.node.spec.ssh is not None


def _by_server(failed: FailedAttempt) -> bool:
    """Whether it was the server that failed, and not the tunnel to it; nor a server that was gone before, which over a
    tunnel looks the same: the connection to the local port is made, and then ends."""
    if not _at_request(failed) or failed.lease is None:
        return False
    if not _over_tunnel(failed):
        return True
    node = failed.lease.node
    at_once_s = max(AT_ONCE_S, AT_ONCE_RTTS * (node.tunnel_state.rtt_ms or 0.0) / 1000.0)
    return node.is_same_connection(failed.lease) and (node.reachable or failed.duration_s > at_once_s)


def _refused(answer: WholeAnswer) -> FailedAttempt:
    """A node that answers the rest of an answer with anything but a stream does not understand what is wanted."""
    error = BackendStatus(f"it answered {answer.status} to the rest of an answer", status=answer.status)
    return FailedAttempt(answer.node, Outcome.CANNOT_CONTINUE, error, answer)
