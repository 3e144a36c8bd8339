"""``ServerDriver``: sends requests to a simulated server without a balancer."""

from __future__ import annotations

import math
from typing import Any

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.bench.simulate.fleet import NodeSpec
from gpumesh.bench.simulate.requests import Attempt, Job
from gpumesh.bench.simulate.servers.server import SimulatedServer
from tests.bench.simulate.build import request


class ServerDriver:
    """Sends requests to a server at given times, and collects when each ended and how."""

    def __init__(self, spec: NodeSpec) -> None:
        self.server = SimulatedServer(spec)
        self.ends: dict[int, tuple[float, Outcome]] = {}
        self.counters: dict[int, ServerCounters | None] = {}
        self.first_tokens: dict[int, float] = {}

    def send(self, number: int, at: float, **changes: Any) -> None:
        self.advance_to(at)
        sent = request(number, at, **changes)
        self.server.accept(Attempt(Job(sent, at, sent.prompt_tokens, sent.output_tokens), "a", None), at)
        self._collect(at)

    def advance_to(self, until: float) -> None:
        while self.server.next_event_at <= until:
            now = self.server.next_event_at
            self.server.advance(now)
            self._collect(now)

    def finish(self) -> dict[int, float]:
        """Runs until nothing is left to do. Returns when each request ended."""
        while self.server.next_event_at < math.inf:
            self.advance_to(self.server.next_event_at)
        return {number: at for number, (at, _) in self.ends.items()}

    def _collect(self, now: float) -> None:
        for attempt in self.server.first_tokens:
            self.first_tokens[attempt.job.request.number] = now
        for attempt, outcome, counters in self.server.ended:
            self.ends[attempt.job.request.number] = (now, outcome)
            self.counters[attempt.job.request.number] = counters
        self.server.first_tokens.clear()
        self.server.ended.clear()
