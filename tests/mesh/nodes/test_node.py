"""One running node over a direct tunnel to the lab's stand-in: what it offers, what it learns, what it shows."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.nodes.node import Node
from gpumesh.state import BackendPhase, Health, TunnelPhase, TunnelState
from gpumesh.topology import BackendSpec, NodeSpec, Target
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.tunnels.polling import wait_until

HOST = profile.make_instant_host("one")
DEMAND = Demand(model="qwen2.5:7b")


@dataclass
class Seen:
    freed: int = 0
    identified: int = 0
    now: float = 100.0
    changes: ChangeNotifier = field(default_factory=ChangeNotifier)

    def count_freed(self) -> None:
        self.freed += 1

    def count_identified(self) -> None:
        self.identified += 1


def spec_of(url: str, **backend: object) -> NodeSpec:
    parts = urlsplit(url)
    target = Target("127.0.0.1", parts.port or 80)
    return NodeSpec("one", BackendSpec(targets=(target,), **backend))  # type: ignore[arg-type]


@asynccontextmanager
async def running(spec: NodeSpec, seen: Seen) -> AsyncIterator[Node]:
    async with httpx.AsyncClient(trust_env=False) as http:
        node = Node(
            spec,
            clock=lambda: seen.now,
            http=http,
            changes=seen.changes,
            on_slot_freed=seen.count_freed,
            on_gpus_identified=seen.count_identified,
        )
        tunnel = DirectTunnel(spec, clock=asyncio.get_running_loop().time, on_change=node.on_tunnel)
        task = asyncio.create_task(node.run(tunnel))
        try:
            yield node
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def standin() -> AsyncIterator[SimOllama]:
    async with SimOllama(HOST) as server:
        yield server


@pytest.fixture
async def seen() -> Seen:
    return Seen()


@pytest.fixture
async def node(standin: SimOllama, seen: Seen) -> AsyncIterator[Node]:
    async with running(spec_of(standin.url), seen) as made:
        await wait_until(lambda: made.reachable, "the backend was probed")
        yield made


async def test_what_the_probe_found_is_offered_and_shown(node: Node, standin: SimOllama) -> None:
    candidate = node.candidate(100.0)
    assert candidate.usable
    assert candidate.models is not None
    assert "qwen2.5:7b" in candidate.models
    assert node.base_url == standin.url
    state = node.state(queued=3)
    assert (state.health, state.backend.version) == (Health.HEALTHY, "0.12.6-lab")
    assert state.simulated
    assert state.load.queued == 3
    assert state.load.limit is None, "not known before anything ran"


async def test_a_lease_is_counted_once_however_often_it_is_released(node: Node, seen: Seen) -> None:
    lease = node.lease(DEMAND)
    assert node.candidate(100.0).in_flight == 1
    freed = seen.freed
    lease.release(Outcome.SERVED)
    lease.release(Outcome.CUT)
    lease.discard()
    load = node.state(0).load
    assert (load.in_flight, load.served, load.failed, load.cancelled) == (0, 1, 0, 0)
    assert seen.freed == freed + 1


async def test_each_outcome_has_its_own_count_and_an_unused_lease_none(node: Node) -> None:
    for outcome in (Outcome.SERVED, Outcome.CLIENT_GONE, Outcome.SERVER_ERROR, Outcome.CLIENT_ERROR):
        node.lease(DEMAND).release(outcome)
    node.lease(DEMAND).discard()
    node.lease(Demand(model=None, needs_slot=False)).release(Outcome.SERVED)  # costs no inference: not in the figures
    load = node.state(0).load
    assert (load.served, load.failed, load.cancelled, load.in_flight) == (1, 1, 1, 0)


async def test_failures_in_a_row_open_the_breaker_and_success_closes_it(node: Node, seen: Seen) -> None:
    for _ in range(3):
        node.lease(DEMAND).release(Outcome.SERVER_ERROR, error="it answered 500")
    assert not node.candidate(seen.now).usable
    assert node.may_recover, "its pause will end: worth waiting for"
    seen.now += 5.0
    assert node.candidate(seen.now).usable
    trial = node.lease(DEMAND)
    assert not node.candidate(seen.now).usable, "one trial at a time"
    trial.release(Outcome.SERVED)
    assert node.candidate(seen.now).usable


async def test_a_store_that_says_500_closes_no_node_for_inference(node: Node, seen: Seen) -> None:
    copy = Demand(model=None, needs_slot=False)
    for _ in range(5):
        node.lease(copy).release(Outcome.SERVER_ERROR, error="it answered 500")
    assert node.candidate(seen.now).usable
    for _ in range(3):
        node.lease(copy).release(Outcome.UNREACHABLE, error="refused")
    assert not node.candidate(seen.now).usable, "that it cannot be reached is true of all requests"


async def test_a_trial_whose_answer_has_begun_lets_others_try(node: Node, seen: Seen) -> None:
    for _ in range(3):
        node.lease(DEMAND).release(Outcome.SERVER_ERROR, error="it answered 500")
    seen.now += 5.0
    trial = node.lease(DEMAND)
    freed = seen.freed
    trial.mark_answer_started()
    assert node.candidate(seen.now).usable
    assert seen.freed > freed, "those that wait are told"
    trial.release(Outcome.CUT, error="it broke off")
    assert not node.candidate(seen.now).usable, "it has failed after all"


async def test_a_server_that_was_away_and_is_back_starts_anew(node: Node, standin: SimOllama, seen: Seen) -> None:
    await standin.set_faults(Faults(status=500))
    for _ in range(3):
        node.lease(DEMAND).release(Outcome.SERVER_ERROR, error="it answered 500")
    await wait_until(lambda: node.state(0).backend.state is not BackendPhase.UP, "the probe sees it, too")
    assert node.tunnel_state.state is TunnelPhase.UP
    await standin.set_faults(Faults())
    await wait_until(lambda: node.candidate(seen.now).usable, "it is used at once, though no time has passed")


async def test_a_clients_leaving_is_no_fault(node: Node, seen: Seen) -> None:
    for _ in range(10):
        node.lease(DEMAND).release(Outcome.CLIENT_GONE)
    assert node.candidate(seen.now).usable


async def test_it_learns_rates_limits_and_load_times_from_the_servers_counters(node: Node, seen: Seen) -> None:
    leases = [node.lease(DEMAND) for _ in range(2)]
    counters = ServerCounters(tokens=100, total_ms=1600.0, load_ms=500.0, prompt_ms=100.0, eval_ms=1000.0)
    for lease in leases:
        lease.release(Outcome.SERVED, counters=counters)
    candidate = node.candidate(seen.now)
    assert candidate.tokens_per_s["qwen2.5:7b"] == pytest.approx(100.0)
    assert candidate.load_s["qwen2.5:7b"] == pytest.approx(0.5)
    assert node.state(0).load.limit == 2, "two ran together, and neither waited inside the server"
    assert candidate.limit == 3, "one more is tried"


async def test_max_parallel_is_taken_as_it_is(standin: SimOllama, seen: Seen) -> None:
    async with running(spec_of(standin.url, max_parallel=7), seen) as node:
        await wait_until(lambda: node.reachable, "the backend was probed")
        assert node.candidate(seen.now).limit == 7


async def test_a_lost_tunnel_cuts_what_is_in_flight_and_forgets_what_was_seen(node: Node) -> None:
    cut: list[str] = []
    lease = node.lease(DEMAND)
    lease.abort_callback = lambda: cut.append("aborted")
    node.on_tunnel(TunnelState("direct", TunnelPhase.BACKOFF, last_error="gone"))
    assert cut == ["aborted"]
    assert lease.aborted
    assert not node.candidate(100.0).usable
    assert node.may_recover, "it was up a moment ago"
    lease.release(Outcome.UNREACHABLE, error="gone")


async def test_what_was_cut_with_a_lost_tunnel_is_not_held_against_the_next_one(node: Node, seen: Seen) -> None:
    leases = [node.lease(DEMAND) for _ in range(4)]
    node.on_tunnel(TunnelState("direct", TunnelPhase.BACKOFF, last_error="gone"))
    for lease in leases:
        lease.release(Outcome.UNREACHABLE, error="the way to it was lost")
    node.on_tunnel(TunnelState("direct", TunnelPhase.UP))
    await wait_until(
        lambda: node.candidate(seen.now).usable, "used as soon as it was probed, though no time has passed"
    )


async def test_a_server_that_stops_is_noticed_and_comes_back(node: Node, standin: SimOllama) -> None:
    await standin.set_faults(Faults(refuse=True))
    node.lease(DEMAND).release(Outcome.UNREACHABLE, error="refused")  # makes it look at once
    await wait_until(lambda: not node.reachable, "the server is down")
    state = node.state(0)
    assert state.health is Health.DOWN
    assert state.backend.state is not BackendPhase.UP
    assert str(standin.port) in (state.reason or "")
    await standin.set_faults(Faults())
    await wait_until(lambda: node.reachable, "the server is back")


async def test_sessions_are_remembered_up_to_a_bound(node: Node) -> None:
    for number in range(300):
        demand = Demand(model="m", session=f"s{number}", priority=Priority.BATCH)
        node.lease(demand).release(Outcome.SERVED)
    sessions = node.candidate(100.0).sessions
    assert len(sessions) == 256
    assert "s299" in sessions
    assert "s0" not in sessions


async def test_draining_takes_no_new_work(node: Node) -> None:
    node.draining = True
    assert not node.candidate(100.0).usable
    assert not node.may_recover
    assert node.state(0).health is Health.DRAINING


async def test_a_disabled_node_has_reported_and_is_never_used(seen: Seen) -> None:
    spec = NodeSpec("off", BackendSpec(), enabled=False)
    async with httpx.AsyncClient(trust_env=False) as http:
        node = Node(
            spec,
            clock=lambda: 0.0,
            http=http,
            changes=seen.changes,
            on_slot_freed=lambda: None,
            on_gpus_identified=lambda: None,
        )
        assert node.reported
        assert not node.candidate(0.0).usable
        state = node.state(0)
        assert (state.health, state.reason) == (Health.UNKNOWN, "disabled in mesh.yaml")
