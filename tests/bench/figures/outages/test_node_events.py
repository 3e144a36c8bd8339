"""Nodes that stop serving during a stage."""

from __future__ import annotations

from datetime import UTC, datetime

from gpumesh.bench.figures.gpu_meter import GpuSample
from gpumesh.bench.figures.outages.node_events import NodeEvent, node_events
from gpumesh.state import BackendState, GatewayState, Health, MeshState, NodeState, TunnelState, compute_totals


def sample(at_s: float, *nodes: NodeState) -> GpuSample:
    return GpuSample(at_s, MeshState("home", datetime.now(UTC), GatewayState(), compute_totals(nodes), nodes))


def node(name: str, health: Health = Health.HEALTHY, reason: str | None = None, reconnects: int = 0) -> NodeState:
    tunnel = TunnelState("sshtunnel", reconnects=reconnects, last_error=reason)
    return NodeState(name, health, reason, tunnel, BackendState("ollama"))


def test_a_node_that_dies_and_one_that_comes_back() -> None:
    down = "connection reset"
    samples = [
        sample(100.0, node("oslo"), node("turku")),
        sample(100.5, node("oslo"), node("turku", Health.DOWN, down)),
        sample(101.0, node("oslo", Health.DOWN, "gone"), node("turku", Health.UNKNOWN)),
        sample(101.5, node("oslo", Health.DOWN, "gone"), node("turku")),
    ]
    events = node_events(samples, ["oslo", "turku"], 99.8)
    assert [(event.node, round(event.from_s, 3), event.to_s and round(event.to_s, 3)) for event in events] == [
        ("turku", 0.7, 1.7),
        ("oslo", 1.2, None),
    ]
    assert [event.describe() for event in events] == [
        "turku was down from 0.7 s to 1.7 s: connection reset",
        "oslo was down from 1.2 s to the end: gone",
    ]
    assert node_events(samples, ["oslo"])[0].from_s == 1.0, "without a start: from the first sample"


def test_a_tunnel_that_was_away_between_two_samples_is_known_by_its_reconnects() -> None:
    samples = [sample(0.0, node("oslo")), sample(0.5, node("oslo", Health.DEGRADED, "reset", reconnects=1))]
    assert node_events(samples, ["oslo"]) == [NodeEvent("oslo", 0.5, 0.5, Health.DOWN, "reset")]


def test_a_node_that_never_served_is_no_event() -> None:
    samples = [sample(0.0, node("oslo", Health.DOWN)), sample(0.5, node("oslo", Health.DOWN))]
    assert node_events(samples, ["oslo"]) == []
    assert node_events([], ["oslo"]) == []
