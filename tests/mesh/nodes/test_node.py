"""A running node over a direct tunnel to the lab's server: what tunnel, probes and ledger do to each other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.nodes.node import Node
from gpumesh.state import BackendPhase, Health, TunnelPhase, TunnelState
from gpumesh.topology import BackendKind, BackendSpec, NodeSpec
from tests.mesh.nodes.build import NodeEvents, OtherGateways, make_node, make_spec, run_node, take_lease
from tests.tunnels.polling import wait_until

HOST = profile.make_instant_host("one")
DEMAND = Demand(model="qwen2.5:7b")
NOW = 100.0
LOST = TunnelState("direct", TunnelPhase.BACKOFF, last_error="gone")


@pytest.fixture
async def server() -> AsyncIterator[SimOllama]:
    async with SimOllama(HOST) as simulated:
        yield simulated


@pytest.fixture
async def events() -> NodeEvents:
    return NodeEvents()


@pytest.fixture
async def node(server: SimOllama, events: NodeEvents) -> AsyncIterator[Node]:
    async with run_node(make_spec(server.url), events) as running:
        await wait_until(lambda: running.reachable, "the backend was probed")
        yield running


async def test_the_probed_models_are_offered_and_the_state_shown(node: Node, server: SimOllama) -> None:
    candidate = node.candidate(100.0)
    assert candidate.usable
    assert candidate.models is not None
    assert "qwen2.5:7b" in candidate.models
    assert node.base_url == server.url
    state = node.state(queued=3)
    assert (state.health, state.backend.version) == (Health.HEALTHY, "0.12.6-lab")
    assert state.simulated
    assert state.load.queued == 3
    assert state.load.limit is None, "not known before anything ran"


async def test_repr_tells_the_state(node: Node) -> None:
    lease = take_lease(node, DEMAND, NOW)
    assert repr(node) == "<Node one reachable 1 in flight, tunnel up>"
    assert repr(lease) == "<Lease one held model qwen2.5:7b connection 1>"
    lease.discard()
    node.role.drained = True
    assert repr(node) == "<Node one reachable draining 0 in flight, tunnel up>"
    assert repr(lease) == "<Lease one released model qwen2.5:7b connection 1>"


async def test_a_server_that_was_away_and_is_back_starts_with_a_closed_breaker(
    node: Node, server: SimOllama, events: NodeEvents
) -> None:
    await server.set_faults(Faults(status=500))
    for _ in range(3):
        take_lease(node, DEMAND, NOW).release(Outcome.SERVER_ERROR, error="it answered 500")
    await wait_until(lambda: node.state(0).backend.state is not BackendPhase.UP, "the probe sees the error, too")
    assert node.tunnel_state.state is TunnelPhase.UP
    await server.set_faults(Faults())
    await wait_until(lambda: node.candidate(events.now).usable, "it is used at once, though no time has passed")


async def test_an_open_breaker_may_recover(node: Node) -> None:
    for _ in range(3):
        take_lease(node, DEMAND, NOW).release(Outcome.SERVER_ERROR, error="it answered 500")
    assert node.may_recover(), "its pause will end: worth waiting for"


async def test_max_parallel_is_taken_as_it_is(server: SimOllama, events: NodeEvents) -> None:
    async with run_node(make_spec(server.url, max_parallel=7), events) as node:
        await wait_until(lambda: node.reachable, "the backend was probed")
        assert node.account.slots("m:latest", NOW) == 7


async def test_the_balancer_knows_what_mesh_yaml_says_before_the_first_probe(events: NodeEvents) -> None:
    node = make_node(make_spec("http://127.0.0.1:9", kind=BackendKind.OLLAMA), events)
    assert (node.account.kind, node.account.learns_limit) == (BackendKind.OLLAMA, True)
    assert not node.account.is_up


async def test_the_load_of_a_gateway_that_has_crashed_is_forgotten(server: SimOllama, events: NodeEvents) -> None:
    """Such a gateway announces nothing: its loads are too old after some seconds."""
    others = OtherGateways(5)
    async with run_node(make_spec(server.url), events, coordination=others) as node:
        await wait_until(lambda: node.reachable, "the backend was probed")
        assert node.account.count() == 5
        others.load = 0
        await node.refresh()
        assert node.account.count() == 0


async def test_after_a_failure_the_waiting_requests_are_looked_at(node: Node, events: NodeEvents) -> None:
    lease = take_lease(node, DEMAND, NOW)
    changed = events.changed
    lease.release(Outcome.SERVER_ERROR, error="it answered 500")
    assert events.changed == changed + 1


async def test_a_lost_tunnel_aborts_attempts_and_forgets_the_reports(node: Node) -> None:
    aborted: list[str] = []
    lease = take_lease(node, DEMAND, NOW)
    lease.abort_callback = lambda: aborted.append("aborted")
    node.on_tunnel(LOST)
    assert aborted == ["aborted"]
    assert lease.aborted
    assert not node.candidate(100.0).usable
    assert node.may_recover(), "it was up a moment ago"
    lease.release(Outcome.UNREACHABLE, error="gone")


async def test_attempts_cut_with_a_lost_tunnel_do_not_count_against_the_next_one(
    node: Node, events: NodeEvents
) -> None:
    leases = [take_lease(node, DEMAND, NOW) for _ in range(4)]
    node.on_tunnel(LOST)
    for lease in leases:
        lease.release(Outcome.UNREACHABLE, error="the way to it was lost")
    node.on_tunnel(TunnelState("direct", TunnelPhase.UP))
    await wait_until(
        lambda: node.candidate(events.now).usable, "used as soon as it was probed, though no time has passed"
    )


async def test_a_server_that_stops_is_noticed_and_comes_back(node: Node, server: SimOllama) -> None:
    await server.set_faults(Faults(refuse=True))
    take_lease(node, DEMAND, NOW).release(Outcome.UNREACHABLE, error="refused")  # requests a probe at once
    await wait_until(lambda: not node.reachable, "the server is down")
    state = node.state(0)
    assert state.health is Health.DOWN
    assert state.backend.state is not BackendPhase.UP
    assert str(server.port) in (state.reason or "")
    await server.set_faults(Faults())
    await wait_until(lambda: node.reachable, "the server is back")


async def test_a_draining_node_takes_no_new_work(node: Node) -> None:
    node.role.drained = True
    assert not node.candidate(100.0).usable
    assert not node.may_recover()
    assert node.state(0).health is Health.DRAINING


async def test_a_disabled_node_has_reported_and_is_never_used(events: NodeEvents) -> None:
    node = make_node(NodeSpec("off", BackendSpec(), enabled=False), events)
    assert node.reported
    assert not node.candidate(0.0).usable
    state = node.state(0)
    assert (state.health, state.reason) == (Health.UNKNOWN, "disabled in mesh.yaml")
