"""``RequestDelivery`` delivers one request: it tries node after node until a node answers.

If a node is lost while its answer streams, the other nodes are tried for the rest of the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from msgspec.structs import replace

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.dialects import kinds_that_continue
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import (
    MAX_ROUNDS,
    Outcome,
    is_retryable,
    retry_delay_s,
    rule_for_outcome,
)
from gpumesh.errors import DeadlineExceeded, ModelMissing, NoNodeError
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.request_counters import RequestCounters
from gpumesh.mesh.requests.answer import Answer, SendProgress, WholeAnswer
from gpumesh.mesh.requests.answer_reading import OpenedStream
from gpumesh.mesh.requests.attempt import ask_node, run_attempt, with_model
from gpumesh.mesh.requests.failures import (
    FailedAttempt,
    all_failed_error,
    copy_error,
    find_possible_server_failures,
    find_server_failures,
    lacks_route,
    lost_over_ssh,
    must_stop,
    refused_continuation,
)
from gpumesh.mesh.requests.send_context import SendContext
from gpumesh.mesh.requests.streaming import StreamingAnswer
from gpumesh.topology import BackendKind

# Longest wait for an answer to a question that shows how a node's model continues an answer. The node may have to load
# the model first.
QUESTION_TIMEOUT_S = 60.0
# After this time the mesh knows whether the server or the tunnel ended a connection: a failed tunnel is down by then.
TUNNEL_SETTLE_S = 0.5
_NO_NODES: frozenset[str] = frozenset()


class RequestDelivery:
    """Delivers one request: ``deliver`` returns its answer. Implements ``Failover`` (see there) for an answer that
    streams.

    ``calls`` holds the request in the form for each kind of server, or in one form for all. ``resume``: another node
    may continue a cut answer. ``at_most_once``: the request is not sent again after a server may have begun to work on
    it. ``try_reserve_memory`` reserves this many bytes for the request, and returns whether there is room. ``progress``
    is kept up to date while the request is delivered. ``counters`` count the request and its end; ``None``: it is not
    counted.
    """

    def __init__(
        self,
        context: SendContext,
        demand: Demand,
        calls: HttpCall | Mapping[BackendKind, HttpCall],
        *,
        timeout_s: float,
        resume: bool,
        at_most_once: bool = False,
        try_reserve_memory: Callable[[int], bool] = lambda _: True,
        progress: SendProgress | None = None,
        counters: RequestCounters | None = None,
    ) -> None:
        self._context = context
        self._demand = demand
        self._calls = calls
        self._resume = resume
        self._at_most_once = at_most_once
        self._try_reserve_memory = try_reserve_memory
        self._started_at = context.clock()
        self._deadline = self._started_at + timeout_s  # on the context's clock
        # The nodes that must not get the next attempt.
        self._excluded_nodes = _NO_NODES if demand.is_known_route else self._find_lacking_nodes()
        self._failures: list[FailedAttempt] = []  # the attempts that failed, in order
        self._round = 1  # in each round, every node may get one attempt
        self._progress = SendProgress() if progress is None else progress
        self._counters = RequestCounters() if counters is None else counters

    def __repr__(self) -> str:
        failed = ", ".join(f"{failure.node} {failure.outcome.value}" for failure in self._failures) or "none"
        return f"<RequestDelivery model {self._demand.model} attempt {self.attempts} failed: {failed}>"

    @property
    def attempts(self) -> int:
        return self._progress.attempts

    async def deliver(self) -> Answer:
        """Tries node after node, and returns the answer of the first node that answers. Raises NoNodeError,
        ModelMissing, QueueFull and DeadlineExceeded."""
        self._counters.accepted += 1
        answer: Answer | None = None
        try:
            while answer is None:
                # Most requests find a free slot at once. After a failure, ``_acquire_lease`` has more to decide.
                lease = None
                if not self._failures and not self._context.dispatcher.asks_others:
                    lease = self._context.dispatcher.acquire_now(self._demand, self._excluded_nodes)
                if lease is None:
                    lease = await self._acquire_lease()
                if lease is None:
                    answer = self._last_error_answer()
                    continue
                call, model = self._call_for(lease), self._demand.model
                # Most clients write the name as the server lists it; then not even a coroutine is made.
                is_renamed = model is not None and lease.node.server_name(model) is not None
                named_call = await self._name_model(lease, call) if is_renamed else call
                result = await self._run_attempt(lease, named_call, partial(self._new_continuation, call))
                if not isinstance(result, FailedAttempt):
                    answer = self._streaming_answer(result) if isinstance(result, OpenedStream) else result
                    self._set_figures(answer, lease)
                    continue
                self._record_failure(result)
                if await self._request_breaks_servers():
                    answer = self._last_error_answer()
        except BaseException as error:
            self._counters.count_error(error)
            raise
        if answer.outcome is None:
            answer.on_outcome = self._counters.count_end
        else:  # the answer has ended already
            self._counters.count_end(answer.outcome)
        return answer

    def _new_continuation(self, call: HttpCall) -> Continuation:
        """Makes the ``Continuation`` of a new stream. It is made before the first byte, because it must see every byte
        that the client gets."""
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
        """Makes the answer that passes on this stream, with the time that is left until the deadline."""
        # From now on only servers of the same API can continue this stream: the frames of others look different.
        self._demand = replace(self._demand, kinds=self._demand.kinds & kinds_that_continue(opened.lease.node.kind))
        clock = self._context.clock
        remaining_s = max(self._deadline - clock(), 0.0)
        return StreamingAnswer(opened, self, self._context.pauses, clock=clock, deadline_in_s=remaining_s)

    def _set_figures(self, answer: Answer, lease: Lease | None) -> Answer:
        """Sets the figures of this delivery in the answer, and returns the answer. ``lease``: the lease of the attempt
        that got the answer."""
        if lease is not None:
            answer.placement = lease.placement
        answer.attempts = self._progress.attempts
        answer.queue_ms = self._progress.queue_s * 1000.0
        return answer

    def _last_error_answer(self) -> Answer:
        """The last error answer of a server. Raises NoNodeError if no server answered.

        The client learns that a server lacks the model only if no node has it. So the failures of the other nodes
        come first, and also nodes count that cannot be asked now."""
        lacking = [failed for failed in self._failures if failed.outcome is Outcome.MODEL_NOT_FOUND]
        others = [failed for failed in self._failures if failed.outcome is not Outcome.MODEL_NOT_FOUND]
        if lacking and not others:
            error = self._context.explain_no_node(self._demand, {failed.node for failed in lacking})
            if not isinstance(error, ModelMissing):
                raise error
        for failed in reversed(others or lacking):
            if failed.answer is not None:
                return self._set_figures(failed.answer, failed.lease)
        raise all_failed_error(self._failures)

    # -- continuing a cut stream (the first three methods: see Failover) -----------------------------------------

    def has_other_node(self, node: str) -> bool:
        return self._context.dispatcher.could_serve(self._demand, exclude=frozenset({node}))

    def slot_is_wanted(self, node: str) -> bool:
        return self._context.dispatcher.slot_is_wanted(node)

    async def continue_answer(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        """Continues a cut answer on another node, and tries nodes until one answers. Raises the error of all failures
        if no node is left."""
        # Earlier failures no longer count: each cut of the answer begins a new search for a node.
        self._failures, self._excluded_nodes, self._round = [failed], frozenset({failed.node}), 1
        while True:
            lease = await self._acquire_lease()
            if lease is None:
                raise all_failed_error(self._failures)
            result = await self._continue_on(lease, continuation)
            if not isinstance(result, FailedAttempt):
                return result
            self._record_failure(result)
            if await self._request_breaks_servers():
                raise all_failed_error(self._failures)

    async def _continue_on(self, lease: Lease, continuation: Continuation) -> OpenedStream | Ending | FailedAttempt:
        """Asks this node for the rest of the answer. Returns the node's stream, its failure, or the answer's end if no
        node can continue or nothing is missing."""
        call = await self._next_call(lease, continuation)
        if not isinstance(call, HttpCall):
            return call
        headers = self._call_for(lease).headers  # of the client's request: ``continuation`` has only its path and body
        if headers:
            call = replace(call, headers=headers)
        call = await self._name_model(lease, call)
        result = await self._run_attempt(lease, call, lambda: continuation)
        if isinstance(result, OpenedStream):
            return result
        continuation.abandon_upstream()
        return result if isinstance(result, FailedAttempt) else refused_continuation(result)

    async def _next_call(self, lease: Lease, continuation: Continuation) -> HttpCall | Ending | FailedAttempt:
        """Makes the request for the rest of the answer. The node is first asked how it continues an answer. Returns the
        answer's end if nothing is missing or no node can continue, and the failure if this node cannot. In both cases
        the lease is no longer held."""
        node, kind = lease.node.name, lease.node.kind
        while (question := continuation.next_question(node, kind)) is not None:
            question = await self._name_model(lease, question)
            timeout_s = min(QUESTION_TIMEOUT_S, self._deadline - self._context.clock())
            reply = await ask_node(self._context.upstream, lease, question, timeout_s=timeout_s)
            if isinstance(reply, FailedAttempt):
                return reply
            continuation.apply_reply(*reply)
        call = continuation.next_call(node, kind)
        if not isinstance(call, HttpCall):
            lease.discard()
        if call is None:
            error = NoNodeError("it is not known how its model continues an answer", node=node)
            return FailedAttempt(node, Outcome.CANNOT_CONTINUE, error)
        return call

    async def _name_model(self, lease: Lease, call: HttpCall) -> HttpCall:
        """The call with the name under which the leased node lists the model. Discards the lease and raises QueueFull
        if there is no room for a copy of the body."""
        name = None if self._demand.model is None else lease.node.server_name(self._demand.model)
        if name is None:
            return call
        try:
            return await with_model(call, name, self._try_reserve_memory)
        except BaseException:  # also a cancellation: the attempt was not made, so its slot is free again
            lease.discard()
            raise

    # -- attempts ------------------------------------------------------------------------------------------------

    def _run_attempt(
        self, lease: Lease, call: HttpCall, continuation: Callable[[], Continuation]
    ) -> Awaitable[WholeAnswer | OpenedStream | FailedAttempt]:
        """Counts the attempt, and sends the request to the leased node until the deadline."""
        progress, context = self._progress, self._context
        progress.attempts += 1
        progress.node = lease.node.name
        if progress.placement is not None:
            progress.earlier_placements = (*progress.earlier_placements, progress.placement)
        progress.placement = lease.placement
        lease.can_move = lambda: context.dispatcher.could_serve(
            self._demand, exclude=self._excluded_nodes | {lease.node.name}
        )
        return run_attempt(
            context.upstream,
            lease,
            call,
            timeout_s=self._deadline - context.clock(),
            continuation=continuation,
            may_resend=self._may_resend(),
        )

    def _may_resend(self) -> bool:
        """Whether an attempt may use a kept-alive connection, and send the request again if this connection is stale.
        After a failure of a server that may have worked on the request, the end of the connection could be one more
        failure."""
        if self._at_most_once:
            return False
        return not self._failures or not any(failed.may_have_run for failed in self._failures)

    def _record_failure(self, failed: FailedAttempt) -> None:
        """Records the failure, so that the next attempt goes to another node. Raises the error of the failure if
        another node could not do better, or must not get the request."""
        self._failures.append(failed)
        must_not_repeat = self._at_most_once and failed.may_have_run
        if must_not_repeat or not rule_for_outcome(failed.outcome).fail_over:
            raise copy_error(failed.error) from failed.error.__cause__
        self._excluded_nodes |= {failed.node}
        if not self._demand.is_known_route and lacks_route(failed):
            self._context.route_gaps.add(self._path, failed.node)

    @property
    def _path(self) -> str:
        calls = self._calls
        return calls.path if isinstance(calls, HttpCall) else next(iter(calls.values())).path

    def _call_for(self, lease: Lease) -> HttpCall:
        """The request in the form for the leased node's kind of server."""
        calls = self._calls
        return calls if isinstance(calls, HttpCall) else calls[lease.node.kind]

    def _find_lacking_nodes(self) -> frozenset[str]:
        """The nodes that lately lacked this route; none if no other node could serve the request."""
        lacking = self._context.route_gaps.find_nodes(self._path)
        has_other_node = lacking and self._context.dispatcher.could_serve(self._demand, exclude=lacking)
        return lacking if has_other_node else frozenset()

    async def _request_breaks_servers(self) -> bool:
        """Returns whether the request itself may make servers fail: two servers have answered it with 500, or ended the
        connection while they worked on it (``must_stop``). Then no other node must be asked, and the nodes are forgiven
        the failures."""
        has_other_node = self._context.dispatcher.could_serve(self._demand, exclude=self._excluded_nodes)
        if not must_stop(find_possible_server_failures(self._failures), has_other_node=has_other_node):
            return False
        if any(lost_over_ssh(failed) for failed in self._failures):  # soon it is known whether a tunnel was lost
            await asyncio.sleep(TUNNEL_SETTLE_S)
        server_failures = find_server_failures(self._failures)
        if not must_stop(server_failures, has_other_node=has_other_node):
            return False
        for failed in server_failures:
            if self._demand.needs_slot and failed.lease is not None and failed.lease.node.reachable:
                failed.lease.node.forgive_failure(failed.lease)
        return True

    # -- leases --------------------------------------------------------------------------------------------------

    async def _acquire_lease(self) -> Lease | None:
        """Waits for a slot on a node that has not failed at this request, or that may succeed after a pause.

        If no such node is left, returns ``None`` after failed attempts, and raises the error that explains it if there
        was no attempt. Raises the other errors of ``Dispatcher.acquire`` as well."""
        while True:
            lease = await self._acquire_despite_breaker()
            if lease is not None:
                return lease
            asked_at = self._context.clock()
            try:
                lease = await self._context.dispatcher.acquire(
                    self._demand,
                    exclude=self._excluded_nodes,
                    timeout_s=self._deadline - asked_at,
                    since=self._started_at if self._failures else None,
                )
            except NoNodeError:  # also ModelMissing: no node is left
                if not self._failures:
                    raise self._context.explain_no_node(self._demand, ()) from None
                if not await self._start_next_round():
                    return None
                continue
            finally:  # also if the client has left meanwhile
                self._progress.queue_s += self._context.clock() - asked_at
            return lease

    async def _acquire_despite_breaker(self) -> Lease | None:
        """Takes a slot on a node with an open breaker, if the last failure was a server's error and no other node is
        left: an attempt there is better than to return the error. Returns ``None`` if this is not so, or if no such
        node has a free slot."""
        if not self._failures or self._failures[-1].outcome is not Outcome.SERVER_ERROR:
            return None
        dispatcher = self._context.dispatcher
        if dispatcher.could_serve(self._demand, exclude=self._excluded_nodes):
            return None
        return await dispatcher.acquire_despite_breaker(self._demand, exclude=self._excluded_nodes)

    async def _start_next_round(self) -> bool:
        """Called when every node has failed. Pauses, and then allows the nodes whose last failure may be over by now.

        Returns ``False`` if no node may be asked again. Raises DeadlineExceeded if the pause would last until the
        deadline."""
        last_outcomes = {failed.node: failed.outcome for failed in self._failures}
        retryable_nodes = frozenset(node for node, outcome in last_outcomes.items() if is_retryable(outcome))
        no_node_to_retry = not retryable_nodes & self._excluded_nodes
        if no_node_to_retry or self._round >= MAX_ROUNDS:
            return False
        pause_s = retry_delay_s(self._round, self._context.rng)
        if self._context.clock() + pause_s >= self._deadline:
            raise DeadlineExceeded("the deadline passed while no node could serve this") from None
        await asyncio.sleep(pause_s)
        self._round += 1
        self._excluded_nodes -= retryable_nodes
        return True
