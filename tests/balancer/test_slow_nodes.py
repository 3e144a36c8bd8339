"""A node that becomes slow gets fewer requests, is probed, and gets its share again when it has recovered."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
from msgspec.structs import replace

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.outliers import IDLE_PROBE_S, PROBE_EVERY
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.topology import BackendKind, PolicyKind

MODEL = "a:8b"
DEMAND = Demand(MODEL, residency=ResidencyKey(MODEL), prompt_tokens=400, max_tokens=100)
TOKENS = 100
TOKEN_S, READ_S = 0.01, 0.2


@dataclass
class Fleet:
    """Nodes with one slot each. Requests come at random, as many as two thirds of the nodes can serve. ``slow``: how
    many times slower a node is than usual."""

    scheduler: Scheduler
    now: float = 1000.0
    slow: dict[str, float] = field(default_factory=dict)
    tells_durations: bool = True
    used: Counter[str] = field(default_factory=Counter)
    _events: list[tuple[float, int, PlacedRequest | None]] = field(default_factory=list)
    _count: int = 0
    _rng: Random = field(default_factory=lambda: Random(5))

    def serve(self, count: int, *, gap_s: float | None = None) -> Counter[str]:
        """Serves requests. Returns how many each node has got. ``gap_s``: the mean time between two of them."""
        self.used = Counter()
        mean_gap_s = gap_s or 1.5 * (READ_S + TOKENS * TOKEN_S) / len(self.scheduler.accounts)
        at = self.now
        for _ in range(count):
            at += self._rng.expovariate(1.0 / mean_gap_s)
            self._add_event(at, None)
        while self._events:
            self.now, _, placed = heapq.heappop(self._events)
            if placed is None:
                placement = self.scheduler.place_now(DEMAND, self.now)
                if placement is None:
                    self.scheduler.wait(DEMAND, self.now, None)
                else:
                    self._start(placement.placed)
            elif placed.first_token_at is None:
                self.scheduler.note_first_token(placed, self.now)
                self._add_event(self.now + TOKENS * TOKEN_S * self._factor(placed), placed)
            else:
                self.scheduler.end(placed, self.now, self._counters(self._factor(placed)))
            for _, granted in self.scheduler.grants(self.now):
                self._start(granted.placed)
        return self.used

    def _add_event(self, at: float, placed: PlacedRequest | None) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, placed))

    def _factor(self, placed: PlacedRequest) -> float:
        return self.slow.get(placed.account.name, 1.0)

    def _start(self, placed: PlacedRequest) -> None:
        self.used[placed.account.name] += 1
        self._add_event(self.now + READ_S * self._factor(placed), placed)

    def _counters(self, factor: float) -> ServerCounters:
        if not self.tells_durations:
            return ServerCounters(tokens=TOKENS, prompt_tokens=400)
        eval_ms, prompt_ms = 1000 * TOKENS * TOKEN_S * factor, 1000 * READ_S * factor
        return ServerCounters(400, TOKENS, eval_ms + prompt_ms, load_ms=1.0, prompt_ms=prompt_ms, eval_ms=eval_ms)


def make_fleet(count: int = 3) -> Fleet:
    scheduler = Scheduler(PolicyKind.ADAPTIVE, rng=Random(1), max_queue=100)
    for number in range(count):
        account = scheduler.roster.add(f"node{number}", max_parallel=1)
        account.kind, account.is_up, account.models = BackendKind.OLLAMA, True, frozenset({MODEL})
        account.residency.replace_with_report({MODEL: (8000, None)}, asked_at=0.0)
        scheduler.note_report(account)
    return Fleet(scheduler)


def test_a_normal_fleet_has_no_slow_nodes() -> None:
    fleet = make_fleet()
    used = fleet.serve(150)
    assert min(used.values()) >= 40
    assert all(account.slowness == 1.0 for account in fleet.scheduler.accounts.values())


def test_a_slow_node_is_probed_and_comes_back() -> None:
    fleet = make_fleet()
    fleet.serve(90)
    fleet.slow["node0"] = 6.0
    used = fleet.serve(200)
    assert used["node0"] <= 40, "a third of them would be 67"
    slowness = fleet.scheduler.slow_nodes.slowness("node0", fleet.now)
    assert slowness is not None
    assert slowness.factor == pytest.approx(6.0, rel=0.3)
    later = fleet.serve(100)
    assert 1 <= later["node0"] <= 100 // PROBE_EVERY + 10, "it gets probes, and no more"
    fleet.slow.clear()
    fleet.serve(400)
    assert fleet.scheduler.slow_nodes.slowness("node0", fleet.now) is None
    assert fleet.scheduler.accounts["node0"].slowness == 1.0
    assert fleet.serve(90)["node0"] >= 20


def test_an_idle_slow_node_is_probed_after_a_while() -> None:
    fleet = make_fleet()
    fleet.serve(90)
    fleet.slow["node0"] = 6.0
    fleet.serve(60)
    assert fleet.serve(10, gap_s=IDLE_PROBE_S + 1.0)["node0"] >= 3


def test_a_request_that_only_the_slow_node_could_serve_is_a_probe_too() -> None:
    fleet = make_fleet()
    fleet.serve(90)
    fleet.slow["node0"] = 6.0
    fleet.serve(60)
    scheduler, now = fleet.scheduler, fleet.now + IDLE_PROBE_S + 1.0
    assert scheduler.slow_nodes.watch.wants_probe("node0", now, in_flight=0)
    placement = scheduler.place_now(replace(DEMAND, node="node0"), now)
    assert placement is not None
    assert not scheduler.slow_nodes.watch.wants_probe("node0", now + 0.1, in_flight=0)


def test_slowness_that_the_rates_have_learned_counts_once() -> None:
    fleet = make_fleet()
    fleet.serve(90)
    account = fleet.scheduler.accounts["node0"]
    before_s = account.rates.decode_s(MODEL, 1.0) / account.slowness
    fleet.slow["node0"] = 4.0
    fleet.serve(600)
    assert account.rates.decode_s(MODEL, 1.0) * account.slowness <= 4.0 * before_s * 1.8


def test_if_all_nodes_become_slower_none_is_slow() -> None:
    fleet = make_fleet()
    fleet.serve(90)
    fleet.slow = dict.fromkeys(fleet.scheduler.accounts, 4.0)
    used = fleet.serve(150)
    assert min(used.values()) >= 25


def test_a_new_server_is_no_slow_node() -> None:
    fleet = make_fleet()
    fleet.serve(90)
    fleet.slow["node0"] = 6.0
    fleet.serve(100)
    fleet.scheduler.slow_nodes.forget("node0")
    assert fleet.scheduler.accounts["node0"].slowness == 1.0
    assert fleet.scheduler.slow_nodes.slowness("node0", fleet.now) is None


def test_a_slow_node_is_seen_by_our_clock_if_its_server_gives_no_durations() -> None:
    fleet = make_fleet()
    fleet.tells_durations = False
    fleet.serve(90)
    account = fleet.scheduler.accounts["node0"]
    assert account.rates.decode_s(MODEL, 1.0) == pytest.approx(TOKEN_S, rel=0.1)
    fleet.slow["node0"] = 6.0
    fleet.serve(200)
    assert fleet.scheduler.slow_nodes.slowness("node0", fleet.now) is not None
