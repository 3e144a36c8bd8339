"""The dispatcher of gpumesh 1 (``mesh/dispatch.py``, ``mesh/nodes/ledger.py``) without asyncio, for the simulator.

It uses the balancer's own code: the policies, the queue, the learned limit, the breaker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.limits import ParallelLimit, learn_limit
from gpumesh.balancer.outcomes import Outcome, rule_for_outcome
from gpumesh.balancer.policies import POLICIES
from gpumesh.balancer.queue import WaitQueue
from gpumesh.balancer.select import select_candidates
from gpumesh.bench.simulate.fleet import NodeSpec
from gpumesh.bench.simulate.requests import Attempt, Grant, Job
from gpumesh.topology import BackendKind, PolicyKind

SMOOTHING = 0.3  # as mesh/nodes/rate_meter.py
MIN_LOAD_MS = 200.0  # as mesh/nodes/ledger.py: a shorter load_duration is no load
MIN_RATE_TOKENS = 4
RECHECK_S = 0.2  # as mesh/dispatch.py: between two attempts to grant slots while nodes are away
GRACE_S = 6.0  # as mesh/dispatch.py: how long a job waits if all nodes that could serve it are away


class _Node:
    """All that the gateway knows of a node, and the candidate that it shows to the policies."""

    __slots__ = ("breaker", "in_flight", "is_up", "limit", "load_s", "loaded", "rates", "spec")

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.limit = ParallelLimit()
        self.breaker = Breaker()
        self.in_flight = 0
        self.is_up = True
        self.loaded: frozenset[str] = frozenset(spec.loaded)
        self.rates: dict[str, float] = {}
        self.load_s: dict[str, float] = {}

    def candidate(self, now: float) -> Candidate:
        return Candidate(
            name=self.spec.name,
            kind=BackendKind.OLLAMA,
            usable=self.is_up and self.breaker.allows(now),
            models=frozenset(self.spec.models),
            loaded=self.loaded,
            in_flight=self.in_flight,
            limit=self.spec.max_parallel or self.limit.max_in_flight(now),
            weight=self.spec.weight,
            group=self.spec.name,
            tokens_per_s=self.rates,
            load_s=self.load_s,
            rtt_ms=self.spec.rtt_s * 1000.0,
        )

    def learn(self, model: str, counters: ServerCounters, concurrent: int, now: float) -> None:
        """Updates what is known from the server's figures for one answer."""
        if self.spec.max_parallel is None:
            waited_ms, total_ms = counters.waited_ms, counters.total_ms
            self.limit = learn_limit(self.limit, waited_ms=waited_ms, total_ms=total_ms, concurrent=concurrent, now=now)
        if counters.tokens_per_s is not None and (counters.tokens or 0) >= MIN_RATE_TOKENS:
            _smooth(self.rates, model, counters.tokens_per_s)
        if counters.load_ms is not None and counters.load_ms > MIN_LOAD_MS:
            _smooth(self.load_s, model, counters.load_ms / 1000.0)
        if model not in self.loaded:
            self.loaded |= {model}


def _smooth(means: dict[str, float], name: str, value: float) -> None:
    old = means.get(name)
    means[name] = value if old is None else old + SMOOTHING * (value - old)


class TodaysDecisions:
    """Implements ``Decisions`` as the dispatcher of gpumesh 1 decides."""

    def __init__(self, specs: Sequence[NodeSpec], kind: PolicyKind, *, rng: Random, max_queue: int) -> None:
        self._nodes = {spec.name: _Node(spec) for spec in specs}
        self._positions = {spec.name: position for position, spec in enumerate(specs)}
        self._candidates = [node.candidate(0.0) for node in self._nodes.values()]
        self._policy = POLICIES[kind]
        self._rng = rng
        self._turn = 0
        self._queue: WaitQueue[Job] = WaitQueue(max_queue)
        self._any_away = False  # a node was away or a breaker open when a slot was last looked for
        self._away_since: dict[int, float] = {}  # by the job's identity: since when no node could serve it

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, job: Job, now: float) -> Grant | None:
        self._any_away = self._any_away or any(not candidate.usable for candidate in self._candidates)
        if self._any_away:
            self._refresh_all(now)
        grant = self._take_slot(job, now)
        if grant is not None:
            return grant
        # A job that was accepted before may always wait again.
        if self._queue.is_full and job.attempts == 0:
            return Grant(job, None)
        if not self._may_wait(job, now):
            return Grant(job, None)
        self._queue.add(job, job.request.priority, job.submitted_at, bounded=False)
        return None

    def _take_slot(self, job: Job, now: float) -> Grant | None:
        demand = _demand(job)
        free = select_candidates(self._candidates, demand, exclude=job.failed_nodes).free
        if not free:
            return None
        if len(free) == 1:
            name = free[0].name
        else:
            self._turn += 1
            name = self._policy(free, demand, self._turn, self._rng)[0]
        node = self._nodes[name]
        node.in_flight += 1
        node.breaker = node.breaker.record_start(now)
        self._refresh(name, now)
        return Grant(job, name, node.in_flight)

    def _may_wait(self, job: Job, now: float) -> bool:
        """Whether the job may wait: a busy node could serve it, or the nodes that could are away for a short time."""
        demand = _demand(job)
        if select_candidates(self._candidates, demand, exclude=job.failed_nodes).busy:
            self._away_since.pop(id(job), None)
            return True
        could_serve = any(
            job.request.model in node.spec.models and name not in job.failed_nodes for name, node in self._nodes.items()
        )
        since = self._away_since.setdefault(id(job), now)
        return could_serve and now - since < GRACE_S

    def grants(self, now: float) -> Sequence[Grant]:
        if self._any_away:
            self._refresh_all(now)
        has_free_slot = any(candidate.in_flight < (candidate.limit or 1) for candidate in self._candidates)
        if not self._queue.entries or not (has_free_slot or self._any_away):
            return ()
        granted = []
        refused_keys = set()
        for entry in self._queue:
            job = entry.payload
            key = None if job.failed_nodes else job.request.model
            if key in refused_keys:
                continue
            grant = self._take_slot(job, now)
            if grant is None and not self._may_wait(job, now):
                grant = Grant(job, None)
            if grant is not None:
                self._queue.discard(entry)
                self._away_since.pop(id(job), None)
                granted.append(grant)
            elif key is not None:
                refused_keys.add(key)
        return granted

    def next_check(self, now: float) -> float | None:
        return now + RECHECK_S if self._any_away and self._queue.entries else None

    def note_first_token(self, attempt: Attempt, now: float) -> None:
        node = self._nodes[attempt.node]
        if node.breaker.trial_in_flight:
            node.breaker = node.breaker.cancel_trial()
            self._refresh(attempt.node, now)

    def end(self, attempt: Attempt, now: float, outcome: Outcome, counters: ServerCounters | None) -> None:
        node = self._nodes[attempt.node]
        node.in_flight -= 1
        if outcome is Outcome.SERVED:
            node.breaker = node.breaker.record_success()
            if counters is not None:
                node.learn(attempt.job.request.model, counters, attempt.running, now)
        elif rule_for_outcome(outcome).counts_against_node:
            node.breaker = node.breaker.record_failure(now)
        else:
            node.breaker = node.breaker.cancel_trial()
        self._refresh(attempt.node, now)

    def set_report(self, node: str, *, is_up: bool, loaded: Mapping[str, tuple[int, int]], now: float) -> None:
        state = self._nodes[node]
        if state.is_up and is_up and state.loaded == loaded.keys():
            return
        state.is_up = is_up
        state.loaded = frozenset(loaded)
        self._refresh(node, now)

    def _refresh(self, name: str, now: float) -> None:
        self._candidates[self._positions[name]] = self._nodes[name].candidate(now)

    def _refresh_all(self, now: float) -> None:
        """Computes all candidates anew: the pause of a breaker ends without an event."""
        self._candidates = [node.candidate(now) for node in self._nodes.values()]
        self._any_away = any(not candidate.usable for candidate in self._candidates)


def _demand(job: Job) -> Demand:
    request = job.request
    return Demand(
        model=request.model,
        priority=request.priority,
        session=request.session,
        prompt_tokens=job.prompt_tokens,
        max_tokens=request.max_tokens,
    )
