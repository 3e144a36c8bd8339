"""Finds the changes between two snapshots of a mesh, as events for the log and for `up` without a terminal. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from gpumesh.state import BackendPhase, Finding, Health, MeshState, NodeState, Severity, TunnelPhase, TunnelState

_BAD_HEALTH = (Health.DOWN, Health.DEGRADED)


@dataclass(frozen=True, slots=True)
class LogEvent:
    """A change of the mesh's state. ``level`` is a level of the module ``logging``; ``event`` names the change."""

    level: int
    event: str
    node: str | None
    message: str


def compare_states(old: MeshState | None, new: MeshState) -> Iterator[LogEvent]:
    """Yields the changes between two snapshots that a person would want to know. ``old`` is ``None`` at the start.

    A fault may be the error of a tunnel, the reason of a health, and a finding. The first of these events has its text;
    the health then has no reason, and there is no event for the finding."""
    reported: set[tuple[str | None, str]] = set()  # pairs of a node, and a fault that an event has reported
    old_nodes = {node.name: node for node in old.nodes} if old is not None else {}
    for node in new.nodes:
        yield from _node_changes(old_nodes.get(node.name), node, reported)
    old_keys = {_finding_key(finding) for finding in old.findings} if old is not None else set()
    for finding in new.findings:
        if _finding_key(finding) not in old_keys and (finding.node, finding.message) not in reported:
            level = _level(finding.severity is not Severity.INFO)
            yield LogEvent(level, f"finding {finding.code}", finding.node, finding.message)


def _finding_key(finding: Finding) -> tuple[str, str | None]:
    """Findings with the same key are the same finding, even if their messages differ."""
    return (finding.code, finding.node)


def _node_changes(old: NodeState | None, new: NodeState, reported: set[tuple[str | None, str]]) -> Iterator[LogEvent]:
    """Yields the changes of one node: of its tunnel, its backend and its health. ``old`` is ``None`` for a new node.
    Adds the faults that the events report to ``reported``."""
    for event in _tunnel_change(new.name, old.tunnel if old is not None else None, new.tunnel):
        yield event
        if new.tunnel.last_error and new.tunnel.state is not TunnelPhase.UP:
            reported.add((new.name, new.tunnel.last_error))
    old_backend = old.backend.state if old is not None else BackendPhase.UNKNOWN
    if old_backend is not new.backend.state:
        detail = new.backend.last_error or new.backend.url or ""
        level = _level(new.backend.state is BackendPhase.DOWN)
        text = f"{new.backend.kind} {new.backend.state}" + (f": {detail}" if detail else "")
        yield LogEvent(level, f"backend {new.backend.state}", new.name, text)
        reported.add((new.name, detail))
    old_health = old.health if old is not None else Health.UNKNOWN
    if old_health is not new.health:
        text = f"{old_health} -> {new.health}"
        if new.reason and (new.name, new.reason) not in reported:
            text += f": {new.reason}"
            reported.add((new.name, new.reason))
        yield LogEvent(_level(new.health in _BAD_HEALTH), f"health {new.health}", new.name, text)


def _tunnel_change(node: str, old: TunnelState | None, new: TunnelState) -> Iterator[LogEvent]:
    """Yields one event if the tunnel's phase has changed; none for the first phase and for a repeated attempt."""
    if new.state is TunnelPhase.IDLE:
        return
    if old is not None:
        has_same_phase = old.state is new.state
        if has_same_phase or _is_repeated_attempt(old, new):
            return
    reason = f": {new.last_error}" if new.last_error and new.state is not TunnelPhase.UP else ""
    level = _level(new.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED))
    yield LogEvent(level, f"tunnel {new.state}", node, f"tunnel {new.state}{reason}")


def _is_repeated_attempt(old: TunnelState, new: TunnelState) -> bool:
    """Whether the change is one more attempt to reach a host that is away, or the failure of such an attempt for the
    same reason as before.

    All these attempts are one event. A failure for a new reason is another event.
    """
    if new.state is TunnelPhase.CONNECTING:  # an attempt begins
        return old.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED)
    has_failed = old.state is TunnelPhase.CONNECTING and new.state is not TunnelPhase.UP
    # While a tunnel connects, it keeps the error of the attempt before.
    return has_failed and old.last_error == new.last_error


def _level(is_bad: bool) -> int:
    """Returns the level for the change to a bad state or to any other state."""
    return logging.WARNING if is_bad else logging.INFO
