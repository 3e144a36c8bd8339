"""The reference policy: greedy, with knowledge that no gateway has. It is a yardstick, and not a bound.

It knows the true length of each answer, the contents of the servers' caches, and everything that runs or waits there.
For each node it computes what would happen there until all is done, with and without the new request, if nothing else
came. The best node is the one where the request's own completion time plus the delay of all others is the least. The
request is sent there, even if it must wait there (but see ``BUSY_FACTOR``). Only while no node has a free slot,
requests wait in the gateway, first come first served. A load is charged with what it pushes out: the time to load that
model again, if it was asked for lately, for all requests that would have to wait for it, divided by its copies.

It does not know which requests will come. So on a very busy fleet a policy can be better than it, by some per cent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.bench.simulate.fleet import ModelSpec
from gpumesh.bench.simulate.requests import Attempt, Grant, Job, ServerReport
from gpumesh.bench.simulate.servers.runner import Runner, Slot
from gpumesh.bench.simulate.servers.server import SimulatedServer, find_runner_to_unload, find_waiting_for_load

# A node without a free slot must be so much better than one with a free slot: while a slot stays idle, the fleet loses
# capacity, and the requests that are to come pay for it. Found by trial: with 1 the reference falls behind at 95 % of
# the capacity, with 2.5 it uses too few shared prompts.
BUSY_FACTOR = 1.5
RECENT_S = 60.0  # a model that was asked for within this time will probably be asked for again
DEMAND_SMOOTHING = 0.1  # the weight of the newest gap between two requests for a model


class _Work:
    """What one request needs of a server: seconds of reading and of decoding alone."""

    __slots__ = ("decode_s", "prefill_s")

    def __init__(self, prefill_s: float, decode_s: float) -> None:
        self.prefill_s = prefill_s
        self.decode_s = decode_s


class _Line:
    """A runner in a forecast: from ``ready_at`` on, ``free`` slots take the requests of ``queue`` in order."""

    __slots__ = ("free", "queue", "ready_at")

    def __init__(self, ready_at: float, free: int) -> None:
        self.ready_at = ready_at
        self.free = free
        self.queue: deque[_Work] = deque()


_Lines = dict[tuple[str, int], _Line]  # by model and context length


class _Demand:
    """How often a model is asked for. ``gap_s`` is the smoothed time between two requests; ``None`` before two."""

    __slots__ = ("gap_s", "last_at")

    def __init__(self, now: float) -> None:
        self.last_at = now
        self.gap_s: float | None = None

    def note(self, now: float) -> None:
        """Notes a request."""
        gap_s = now - self.last_at
        self.gap_s = gap_s if self.gap_s is None else self.gap_s + DEMAND_SMOOTHING * (gap_s - self.gap_s)
        self.last_at = now


class ReferenceDecisions:
    """Implements ``Decisions``. ``servers`` are the simulated servers themselves: this policy looks into them."""

    def __init__(self, servers: Sequence[SimulatedServer]) -> None:
        self._servers = {server.spec.name: server for server in servers}
        self._sent = dict.fromkeys(self._servers, 0)  # the jobs that were sent to each node
        # Jobs on their way, with their times of arrival.
        self._in_transit: dict[str, deque[tuple[float, Job]]] = {name: deque() for name in self._servers}
        self._demand: dict[str, _Demand] = {}  # by the full name of the model
        self._sums_without_job: dict[str, tuple[tuple[int, int], float]] = {}  # the cache of ``_sum_without_job``
        self._queue: dict[int, Job] = {}  # by the number of the request, in the order of arrival
        self._turn = 0

    def submit(self, job: Job, now: float) -> Grant | None:
        self._note_demand(job, now)
        if self._queue or not self._any_free_slot(job):  # jobs that wait already go first
            self._queue[job.request.number] = job
            return None
        return self._decide(job, now)

    def grants(self, now: float) -> Sequence[Grant]:
        """Places the jobs that wait, in their order, until no slot is free for the next job."""
        granted: list[Grant] = []
        for job in list(self._queue.values()):
            if not self._any_free_slot(job):
                break
            del self._queue[job.request.number]
            granted.append(self._decide(job, now))
        return granted

    def _note_demand(self, job: Job, now: float) -> None:
        """Notes that the job's model is asked for."""
        model = job.request.model
        demand = self._demand.get(model)
        if demand is None:
            self._demand[model] = _Demand(now)
        else:
            demand.note(now)

    def _decide(self, job: Job, now: float) -> Grant:
        """The grant for the best node; without a node if there is none that could serve the job."""
        model = job.request.model
        self._turn += 1
        names = list(self._servers)
        start = self._turn % len(names)
        best: str | None = None
        best_cost = math.inf
        for name in names[start:] + names[:start]:  # equal nodes take turns
            server = self._servers[name]
            if not server.is_up or name in job.failed_nodes or not server.lies.has_model(model):
                continue
            cost = self._cost(server, job, now)
            if not self._has_free_slot(server, job):
                cost *= BUSY_FACTOR
            if cost < best_cost - 1e-9:
                best, best_cost = name, cost
        if best is None:
            return Grant(job, None)
        self._sent[best] += 1
        self._in_transit[best].append((now + self._servers[best].spec.rtt_s, job))
        return Grant(job, best)

    def next_check(self, now: float) -> float | None:  # noqa: ARG002
        return None

    def note_first_token(self, attempt: Attempt, now: float) -> None: ...

    def end(self, attempt: Attempt, now: float, outcome: Outcome, counters: ServerCounters | None) -> None: ...

    def set_report(self, node: str, report: ServerReport, now: float) -> None: ...

    def _any_free_slot(self, job: Job) -> bool:
        """Whether the job can be decided now: a slot is free for it, or no node will ever have a slot for it."""
        servers = [server for server in self._servers.values() if server.lies.has_model(job.request.model)]
        return not servers or any(self._has_free_slot(server, job) for server in servers)

    def _has_free_slot(self, server: SimulatedServer, job: Job) -> bool:
        """Whether the job would get a slot of its model at once, or after the load that it needs."""
        spec = server.spec.models.get(job.request.model)
        if spec is None or not server.is_up:
            return False
        runner = server.runners.get(job.request.model)
        users = 0 if runner is None else runner.users
        return users + len(find_waiting_for_load(server)) + len(self._still_in_transit(server)) < spec.slots

    def _still_in_transit(self, server: SimulatedServer) -> deque[tuple[float, Job]]:
        """The jobs that were sent to the server and have not arrived, in order, each with the time of its arrival."""
        in_transit = self._in_transit[server.spec.name]
        while len(in_transit) > self._sent[server.spec.name] - server.arrivals:
            in_transit.popleft()
        return in_transit

    # -- the cost of a node --------------------------------------------------------------------------------------

    def _cost(self, server: SimulatedServer, job: Job, now: float) -> float:
        """The seconds until this job would be done on this server, and the seconds by which it would delay others."""
        sum_without_job = self._sum_without_job(server, now)
        lines = self._lines(server, now)
        line, penalty_s = self._line_for(server, lines, job, now)
        line.queue.append(_work_of(server, job))
        if len(line.queue) == 1:
            arrives_at = now + server.spec.rtt_s
            line.ready_at = max(line.ready_at, arrives_at)
        sum_with_job = sum(_finish_times(server, lines, now))
        # The difference of the sums is the end of this job and the delays of the others.
        return sum_with_job - sum_without_job - now + penalty_s

    def _sum_without_job(self, server: SimulatedServer, now: float) -> float:
        """The sum of the times at which the requests that the server has already will end. The sum changes only when
        something happens on the server, so it is cached."""
        key = (server.revision, len(self._still_in_transit(server)))
        cached = self._sums_without_job.get(server.spec.name)
        if cached is None or cached[0] != key:
            cached = (key, sum(_finish_times(server, self._lines(server, now), now)))
            self._sums_without_job[server.spec.name] = cached
        return cached[1]

    def _lines(self, server: SimulatedServer, now: float) -> _Lines:
        """The queues of the server's runners with the waiting requests, and the queues of runners that will be
        loaded."""
        lines: _Lines = {}
        for runner in server.runners.values():
            line = lines[runner.spec.name, runner.context] = _Line(
                now if runner.is_ready else server.load_ends_at, len(runner.free_slots)
            )
            for attempt in runner.waiting:
                line.queue.append(_work_of(server, attempt.job))
        for job in (
            *(attempt.job for attempt in find_waiting_for_load(server)),
            *(job for _, job in self._in_transit[server.spec.name]),
        ):
            line, _penalty = self._line_for(server, lines, job, now)
            line.queue.append(_work_of(server, job))
        return lines

    def _line_for(self, server: SimulatedServer, lines: _Lines, job: Job, now: float) -> tuple[_Line, float]:
        """The queue of the job's model, and the seconds that its load costs the users of the model that it pushes
        out."""
        request = job.request
        spec = server.spec.models[request.model]
        runner = server.runners.get(request.model)
        key = (request.model, request.context or server.spec.context)
        line = lines.get(key)
        if line is not None:
            return line, 0.0
        # A load begins when all earlier loads have ended, and the runner that must go has no users any more.
        begins_at = max([now, *(other.ready_at for other in lines.values())])
        to_unload = runner or find_runner_to_unload(server.spec, server.runners, request.model)
        penalty_s = 0.0
        if to_unload is not None:
            begins_at = max(begins_at, now + _drain_s(server, to_unload))
            penalty_s = self._reload_cost(to_unload.spec, now)
        line = lines[key] = _Line(begins_at + spec.load_s, spec.slots)
        return line, penalty_s

    def _reload_cost(self, spec: ModelSpec, now: float) -> float:
        """The seconds that later requests would lose if this model had to be loaded again. 0 for a model that was not
        asked for lately."""
        demand = self._demand.get(spec.name)
        if demand is None or now - demand.last_at > RECENT_S:
            return 0.0
        copies = sum(spec.name in server.runners for server in self._servers.values())
        waiters = spec.load_s / max(demand.gap_s or RECENT_S, 1e-3)  # the requests that come during the load
        return spec.load_s * max(waiters / 2.0, 1.0) / max(copies, 1)


def _work_of(server: SimulatedServer, job: Job) -> _Work:
    """What the job needs of this server, with what its cache holds now."""
    request = job.request
    spec = server.spec.models[request.model]
    cached_tokens = 0
    runner = server.runners.get(request.model)
    if runner is not None and request.blocks:
        cached_tokens = runner.cached_tokens(request, _used_slots(server, runner))
    unread_tokens = max(job.prompt_tokens - cached_tokens, 1)
    return _Work(unread_tokens / spec.prefill_tokens_per_s, job.tokens_left / spec.tokens_per_s)


def _used_slots(server: SimulatedServer, runner: Runner) -> Iterator[Slot]:
    """The slots of the runner that are busy now."""
    return (attempt.slot for attempt, its_runner in server.running.items() if its_runner is runner)


def _drain_s(server: SimulatedServer, runner: Runner) -> float:
    """About how many seconds the runner's requests still need, if no other request comes."""
    work_s = sum(attempt.decode_s + attempt.prefill_s for attempt, other in server.running.items() if other is runner)
    work_s += sum(work.decode_s + work.prefill_s for work in (_work_of(server, a.job) for a in runner.waiting))
    slots = runner.spec.slots
    streams = min(max(runner.users, 1), slots)
    return work_s / 2.0 / streams * (1.0 + server.spec.share * (streams - 1))


def _finish_times(server: SimulatedServer, lines: _Lines, now: float) -> Iterator[float]:
    """Yields the time at which each request on the server ends, if no other request comes. Simulates the server's own
    rules from now on."""
    spec = server.spec
    share, stall, lanes = spec.share, spec.prefill_stall, spec.prefill_lanes
    reading, decoding = server.gpu.snapshot(now)
    line_of = {attempt: lines[runner.spec.name, runner.context] for attempt, runner in server.running.items()}
    to_read: deque[tuple[float, float, _Line]] = deque(
        (seconds, attempt.decode_s, line_of[attempt]) for seconds, attempt in reading
    )
    streams: list[tuple[float, int, _Line]] = [
        (left, number, line_of[attempt]) for number, (left, attempt) in enumerate(decoding)
    ]
    heapify(streams)
    sequence = len(streams)
    prefills: list[tuple[float, int, float, _Line]] = []
    virtual = 0.0
    factor = server.gpu.factor
    waking = sorted({line.ready_at for line in lines.values() if line.queue and line.ready_at > now}, reverse=True)
    changed_lines: Sequence[_Line] = list(lines.values())
    while True:
        for line in changed_lines:
            while line.queue and line.free > 0 and line.ready_at <= now:
                work = line.queue.popleft()
                line.free -= 1
                to_read.append((work.prefill_s, work.decode_s, line))
        while to_read and len(prefills) < lanes:
            seconds, decode_s, line = to_read.popleft()
            sequence += 1
            heappush(prefills, (now + seconds * factor, sequence, decode_s, line))
        speed = 0.0
        if streams:
            speed = 1.0 / ((1.0 + share * (len(streams) - 1)) * factor)
            if prefills:
                speed *= 1.0 - stall
        prefill_at = prefills[0][0] if prefills else math.inf
        answer_at = now + (streams[0][0] - virtual) / speed if speed > 0.0 else math.inf
        wake_at = waking[-1] if waking else math.inf
        next_at = min(prefill_at, answer_at, wake_at)
        if next_at == math.inf:
            return
        virtual += (next_at - now) * speed
        now = next_at
        if next_at == answer_at:
            line = heappop(streams)[2]
            line.free += 1
            changed_lines = (line,)
            yield now
        elif next_at == prefill_at:
            _, sequence_number, decode_s, line = heappop(prefills)
            heappush(streams, (virtual + decode_s, sequence_number, line))
            changed_lines = ()
        else:
            waking.pop()
            changed_lines = list(lines.values())
