from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from gpumesh.daemon.state_changes import compare_states
from gpumesh.state import BackendPhase, Finding, Health, MeshState, NodeState, Severity, TunnelPhase, TunnelState
from tests.cli.states import down, healthy, mesh


def event_texts(*states: MeshState) -> list[str]:
    """The events of these states, which follow each other."""
    texts = []
    last: MeshState | None = None
    for state in states:
        texts += [f"{event.node}: {event.message}" for event in compare_states(last, state)]
        last = state
    return texts


def mesh_with_tunnel(phase: TunnelPhase, error: str | None = None) -> MeshState:
    node = down("a")
    return mesh(replace(node, health=Health.DOWN, tunnel=TunnelState("sshtunnel", phase, last_error=error)))


def test_the_first_state_is_reported_once() -> None:
    state = mesh(healthy("a"))
    expected = ["a: tunnel up", "a: ollama up: http://127.0.0.1:40123", "a: unknown -> healthy"]
    assert event_texts(state) == expected
    assert event_texts(state, state, state) == expected


def test_each_change_has_its_reason() -> None:
    assert event_texts(mesh(healthy("a")), mesh(down("a")))[3:] == [
        "a: tunnel backoff: nothing listens on 203.0.113.7:22",
        "a: ollama unknown",
        "a: healthy -> down",
    ]
    degraded = replace(healthy("a"), health=Health.DEGRADED, reason="40 % of m runs on the CPU")
    assert event_texts(mesh(healthy("a")), mesh(degraded))[3:] == ["a: healthy -> degraded: 40 % of m runs on the CPU"]


def test_a_fault_that_is_also_a_finding_is_reported_once() -> None:
    message = "nothing listens on 203.0.113.7:22"
    finding = Finding("node-unreachable", Severity.ERROR, "a", message)
    texts = event_texts(mesh(healthy("a"), healthy("b")), mesh(down("a"), healthy("b"), findings=(finding,)))
    assert sum(message in text for text in texts) == 1
    other = replace(finding, node="b")
    texts = event_texts(mesh(healthy("a"), healthy("b")), mesh(down("a"), healthy("b"), findings=(finding, other)))
    assert f"b: {message}" in texts


def test_a_backend_that_goes_down_is_reported() -> None:
    node = healthy("a")
    broken = replace(node, backend=replace(node.backend, state=BackendPhase.DOWN, last_error="it refuses"))
    assert event_texts(mesh(node), mesh(broken))[3:] == ["a: ollama down: it refuses"]


def test_an_unreachable_host_is_reported_once_for_each_reason() -> None:
    states = [
        mesh_with_tunnel(TunnelPhase.IDLE),
        mesh_with_tunnel(TunnelPhase.CONNECTING),
        mesh_with_tunnel(TunnelPhase.BACKOFF, "refused"),
        mesh_with_tunnel(TunnelPhase.CONNECTING, "refused"),
        mesh_with_tunnel(TunnelPhase.BACKOFF, "refused"),
        mesh_with_tunnel(TunnelPhase.CONNECTING, "refused"),
        mesh_with_tunnel(TunnelPhase.BACKOFF, "no route"),
        mesh_with_tunnel(TunnelPhase.CONNECTING, "no route"),
        mesh_with_tunnel(TunnelPhase.FAILED, "the key was refused"),
        mesh_with_tunnel(TunnelPhase.CONNECTING, "the key was refused"),
        mesh_with_tunnel(TunnelPhase.UP, "the key was refused"),
        mesh_with_tunnel(TunnelPhase.CONNECTING, "reset"),
    ]
    assert [line for line in event_texts(*states) if "tunnel" in line] == [
        "a: tunnel connecting",
        "a: tunnel backoff: refused",
        "a: tunnel backoff: no route",
        "a: tunnel failed: the key was refused",
        "a: tunnel up",
        "a: tunnel connecting: reset",
    ]


def test_only_new_findings_are_reported() -> None:
    finding = Finding("same-gpu", Severity.WARNING, None, "one GPU behind a and b")
    state = mesh(healthy("a"), findings=(finding,))
    assert event_texts(mesh(healthy("a")), state, state)[3:] == ["None: one GPU behind a and b"]
    assert event_texts(state, mesh(healthy("a")), state)[4:] == ["None: one GPU behind a and b"]


def test_a_new_node_is_reported() -> None:
    assert event_texts(mesh(healthy("a")), mesh(healthy("a"), healthy("b")))[3:][0] == "b: tunnel up"


@pytest.mark.parametrize(
    ("node", "level"),
    [(healthy("a"), logging.INFO), (down("a"), logging.WARNING)],
)
def test_a_node_that_is_down_is_a_warning(node: NodeState, level: int) -> None:
    assert max(event.level for event in compare_states(None, mesh(node))) == level
