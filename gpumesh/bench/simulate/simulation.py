"""The loop over the events of one simulation: requests come, the balancer decides, the servers work.

The balancer sees what a gateway sees. A request and its answer need one round trip. The simulator spends all of it
before the request arrives at the server. So the balancer notices each event of the server at once, at the same time as
a real gateway would notice it. Only the server's clock is half a round trip late, which the balancer cannot see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any

from gpumesh.balancer.outcomes import (
    MAX_ROUNDS,
    Outcome,
    RequestOutcome,
    request_outcome,
    retry_delay_s,
    rule_for_outcome,
)
from gpumesh.bench.simulate.decisions import make_decisions
from gpumesh.bench.simulate.fleet import Fault, NodeSpec
from gpumesh.bench.simulate.measures import Measures
from gpumesh.bench.simulate.requests import Attempt, Grant, Job, ServerReport, SimulatedRequest
from gpumesh.bench.simulate.servers.server import SimulatedServer
from gpumesh.errors import GPUMeshError

PROBE_S = 2.0  # between two probes of each server, as the mesh does it
MIN_CHECK_GAP_S = 0.001  # so that a balancer that asks for a check in the past does not stop the clock
MAX_ATTEMPTS = 20  # of one job: limits the time that a broken fleet can cost
STUCK_S = 3600.0  # if no server has an event for this time, the waiting requests will never be served

# The kinds of events, in the order in which equal times are served.
_ARRIVE, _SERVER, _REQUEST, _FAULT_START, _FAULT_END, _PROBE, _CHECK, _RETRY = range(8)


class Simulation:
    """One run of a workload over a fleet with one policy. ``run`` may be called once.

    ``requests`` must be in the order of their times. ``seed`` decides what the policy draws at random."""

    def __init__(
        self,
        nodes: Sequence[NodeSpec],
        requests: Iterable[SimulatedRequest],
        policy: str,
        *,
        seed: int = 1,
        max_queue: int = 1024,
    ) -> None:
        self.servers = {node.name: SimulatedServer(node) for node in nodes}
        self.decisions = make_decisions(policy, list(self.servers.values()), rng=Random(seed), max_queue=max_queue)
        self.measures = Measures(policy, [node.name for node in nodes])
        self._requests: Iterator[SimulatedRequest] = iter(requests)
        self._rng = Random(seed)  # only for the loop; the policy has another generator
        self._events: list[tuple[float, int, int, Any]] = []  # a heap: time, kind, sequence, object
        self._sequence = 0  # keeps events of the same time in order
        self._scheduled = dict.fromkeys(self.servers, math.inf)  # when each server's next event is on the heap
        self._unfinished = 0  # jobs that have not ended, and turns of a conversation that are on the heap
        self._waiting = 0  # jobs in the gateway's queue
        self._next_check_at = math.inf  # when the balancer wants to look at its queue again, without another event
        self._next_check_is_stale = False  # the balancer has decided something since it was asked for that time
        self._last_check_at = -1.0
        self._last_event_at = 0.0  # of a server, or the arrival of a request

    def __repr__(self) -> str:
        return f"<Simulation {self._unfinished} unfinished, {self._waiting} waiting>"

    def run(self) -> Measures:
        """Runs until all requests have ended."""
        events = self._events
        for node in self.servers.values():
            for fault in node.spec.faults:
                self._push(fault.starts_at, _FAULT_START, (node, fault))
                if fault.ends_at < math.inf:
                    self._push(fault.ends_at, _FAULT_END, (node, fault))
        self._push(PROBE_S, _PROBE, None)
        request = next(self._requests, None)
        now = 0.0
        while request is not None or self._unfinished:
            # The workload's requests are in order already, so they are not on the heap. They come first at equal times.
            if request is not None and (not events or request.at_s <= events[0][0]):
                now = request.at_s
                self._begin(request, now)
                request = next(self._requests, None)
            else:
                now, kind, _, subject = heappop(events)
                self._handle(kind, subject, now, has_more_requests=request is not None)
            if self._waiting and self._next_check_is_stale:
                self._next_check_is_stale = False
                self._schedule_check(now)
        self.measures.finish(now, self.servers.values())
        return self.measures

    def _push(self, at: float, kind: int, subject: Any) -> None:
        """Puts an event onto the heap."""
        self._sequence += 1
        heappush(self._events, (at, kind, self._sequence, subject))

    def _handle(self, kind: int, subject: Any, now: float, *, has_more_requests: bool) -> None:
        """Handles one event of the heap. ``has_more_requests``: the workload has not ended."""
        if kind == _SERVER:
            server: SimulatedServer = subject
            if self._scheduled[server.name] == now:  # otherwise the server's next event has changed meanwhile
                self._scheduled[server.name] = math.inf
                server.advance(now)
                self._report_events(server, now)
        elif kind == _ARRIVE:
            attempt: Attempt = subject
            server = self.servers[attempt.node]
            server.accept(attempt, now)
            self._report_events(server, now)
        elif kind == _REQUEST:
            self._unfinished -= 1  # it was counted as a turn on the heap; ``_begin`` counts its job
            self._begin(subject, now)
        elif kind == _RETRY:
            self._submit(subject, now)
        elif kind == _CHECK:
            self._next_check_at = math.inf
            self._last_check_at = now
            self._grant_waiting(now)
        elif kind == _PROBE:
            self._probe(now, has_more_requests=has_more_requests)
        else:
            server, fault = subject
            self._change_fault(server, fault, now, starts=kind == _FAULT_START)

    # -- jobs ----------------------------------------------------------------------------------------------------

    def _begin(self, request: SimulatedRequest, now: float) -> None:
        """Makes a job of a request that arrives now."""
        self._unfinished += 1
        self._last_event_at = now
        self._submit(Job(request, now, request.prompt_tokens, request.output_tokens), now)

    def _submit(self, job: Job, now: float) -> None:
        """Asks the balancer where the job should go."""
        self._next_check_is_stale = True
        grant = self.decisions.submit(job, now)
        if grant is None:
            self._waiting += 1
        else:
            self._apply_grant(grant, now)

    def _apply_grant(self, grant: Grant, now: float) -> None:
        """Sends the job to the node of the grant, or ends it."""
        job, node = grant.job, grant.node
        if node is None:
            self._give_up(job, now)
            return
        if job.sent_at is None:
            job.sent_at = now
        job.attempts += 1
        attempt = Attempt(job, node, grant.running)
        self._push(now + self.servers[node].spec.rtt_s, _ARRIVE, attempt)

    def _give_up(self, job: Job, now: float) -> None:
        """Ends a job that no node could serve. If the job was sent to a node before, it is tried again on all nodes
        after a pause, as often as the gateway does it."""
        if job.attempts and job.rounds < MAX_ROUNDS:
            job.failed_nodes = frozenset()
            self._push(now + retry_delay_s(job.rounds, self._rng), _RETRY, job)
            job.rounds += 1
            return
        self._end_job(job, now, None)

    def _end_job(self, job: Job, now: float, attempt: Attempt | None) -> None:
        """Counts a job that has ended: served by this attempt, or lost (``None``). Schedules the client's next turn."""
        self._unfinished -= 1
        if attempt is None:
            self.measures.add_lost(job)
        else:
            self.measures.add_served(job, attempt, now)
        next_turn = job.request.next_turn
        if next_turn is not None:
            self._unfinished += 1
            self._push(now + job.request.think_s, _REQUEST, next_turn)

    # -- the servers ---------------------------------------------------------------------------------------------

    def _report_events(self, server: SimulatedServer, now: float) -> None:
        """Reports the events of the server to the balancer, and schedules the server's next event."""
        self._last_event_at = now
        next_at = server.next_event_at
        name = server.name
        if next_at != self._scheduled[name]:
            self._scheduled[name] = next_at
            if next_at < math.inf:
                self._push(next_at, _SERVER, server)
        if server.first_tokens:
            for attempt in server.first_tokens:
                if attempt.job.first_token_at is None:
                    attempt.job.first_token_at = now
                self.decisions.note_first_token(attempt, now)
            server.first_tokens.clear()
            if self._waiting and not server.ended:
                self._grant_waiting(now)
        if server.ended:
            ended = server.ended
            server.ended = []
            for attempt, outcome, counters in ended:
                self.decisions.end(attempt, now, outcome, counters)
            for attempt, outcome, _counters in ended:
                self._finish_attempt(attempt, outcome, now)
            if self._waiting:
                self._grant_waiting(now)

    def _finish_attempt(self, attempt: Attempt, outcome: Outcome, now: float) -> None:
        """Ends the attempt's job, or moves it to another node."""
        job = attempt.job
        if request_outcome(outcome) is RequestOutcome.SERVED:
            self._end_job(job, now, attempt)
        elif rule_for_outcome(outcome).fail_over and job.attempts < MAX_ATTEMPTS:
            job.failed_nodes |= {attempt.node}
            self._submit(job, now)
        else:
            self._end_job(job, now, None)

    def _grant_waiting(self, now: float) -> None:
        """Sends the waiting jobs to which the balancer gives slots now."""
        self._next_check_is_stale = True
        grants = self.decisions.grants(now)
        self._waiting -= len(grants)
        for grant in grants:
            self._apply_grant(grant, now)

    def _schedule_check(self, now: float) -> None:
        """Schedules the check that the balancer wants next, unless an earlier check is scheduled already."""
        wanted_at = self.decisions.next_check(now)
        if wanted_at is None:
            return
        check_at = max(wanted_at, now)
        if check_at <= self._last_check_at:  # a check at this time changed nothing: another one must come later
            check_at = self._last_check_at + MIN_CHECK_GAP_S
        if check_at < self._next_check_at:
            self._next_check_at = check_at
            self._push(check_at, _CHECK, None)

    def _probe(self, now: float, *, has_more_requests: bool) -> None:
        """Gives the balancer the results of a probe of all servers. Schedules the next probe, unless all requests have
        ended."""
        for name, server in self.servers.items():
            report = ServerReport(server.is_up, server.lies.listed, server.loaded_models(now))
            self.decisions.set_report(name, report, now)
        if has_more_requests or self._unfinished:
            self._push(now + PROBE_S, _PROBE, None)
        self._check_progress(now)
        if self._waiting:
            self._grant_waiting(now)

    def _check_progress(self, now: float) -> None:
        """Raises GPUMeshError when requests wait in the gateway, and nothing has happened for ``STUCK_S``: a fault of
        the balancer, or nodes that stay away for ever."""
        will_happen = any(at < math.inf for at in self._scheduled.values())
        if self._waiting and not will_happen and now - self._last_event_at > STUCK_S:
            raise GPUMeshError(
                f"policy {self.measures.policy}: {self._waiting} requests wait for ever, since "
                f"{self._last_event_at:.0f} s of simulated time",
                hint="either all nodes that could serve them stay away, or the balancer has lost them",
            )

    def _change_fault(self, server: SimulatedServer, fault: Fault, now: float, *, starts: bool) -> None:
        """Starts or ends a fault of the server."""
        server.change_fault(fault, now, starts=starts)
        self._report_events(server, now)
