"""``EventFinder`` finds what is worth telling a person in the states of a mesh, one after another. Pure.

A node that is away for a moment is no news: its tunnel comes back by itself. So a node is reported as down only after
``DOWN_FOR_S``, and as back only if it was reported as down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gpumesh.state import Finding, Health, MeshState, NodeState, Severity
from gpumesh.topology import EventKind

DOWN_FOR_S = 15.0  # so long a node must be down before it is told
UP_FOR_S = 5.0  # so long a node must be up again before it is told as back
# The findings that are events, by code. A changed host key is a finding of the node's tunnel.
FINDING_EVENTS: Mapping[str, EventKind] = MappingProxyType(
    {
        "host-key-changed": EventKind.HOST_KEY_CHANGED,
        "model-missing": EventKind.MODEL_MISSING,
        "model-listed-missing": EventKind.MODEL_MISSING,
        "thrashing": EventKind.THRASHING,
        "disk-full": EventKind.DISK_FULL,
    }
)


@dataclass(frozen=True, slots=True)
class MeshEvent:
    """Something that has happened. ``node`` is ``None`` if it concerns the whole mesh. ``message`` is a sentence,
    ``hint`` says what to do. ``subject`` tells apart events of one kind on one node: the code of a finding."""

    kind: EventKind
    node: str | None
    message: str
    hint: str | None = None
    subject: str = ""


class EventFinder:
    """Compares each state with what was reported before. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        # By the name of the node. A node is in one of the two, or in neither if its health is not known yet.
        self._down_since: dict[str, float] = {}
        self._up_since: dict[str, float] = {}
        self._reported_down: set[str] = set()  # the nodes whose last event says that they are down
        self._is_all_down_reported = False
        self._known: set[tuple[str, str | None]] = set()  # the findings that are present, by code and node

    def __repr__(self) -> str:
        return f"<EventFinder {len(self._reported_down)} reported as down, {len(self._known)} findings>"

    def find(self, state: MeshState, now: float) -> list[MeshEvent]:
        """The events that this state shows first."""
        return [*self._find_findings(state), *self._find_health(state, now)]

    def next_change_s(self, now: float) -> float | None:
        """The seconds until time alone may make an event: a node has been down, or up again, for long enough. ``None``:
        only another state can."""
        waits = [since + DOWN_FOR_S for name, since in self._down_since.items() if name not in self._reported_down]
        waits += [since + UP_FOR_S for name, since in self._up_since.items() if name in self._reported_down]
        return max(min(waits) - now, 0.0) if waits else None

    def _find_findings(self, state: MeshState) -> Iterator[MeshEvent]:
        """Yields an event for each finding that the last state did not have."""
        findings = {(finding.code, finding.node): finding for finding in _findings_of(state)}
        for key, finding in findings.items():
            if key not in self._known:
                kind = FINDING_EVENTS[finding.code]
                yield MeshEvent(kind, finding.node, finding.message, finding.hint, subject=finding.code)
        self._known = set(findings)

    def _find_health(self, state: MeshState, now: float) -> Iterator[MeshEvent]:
        """Yields an event for each node that has been down, or up again, for long enough to report it."""
        nodes = [node for node in state.nodes if node.health is not Health.DRAINING]
        for node in nodes:
            self._note_health(node, now)
        self._forget_nodes({node.name for node in nodes})
        newly_down = [
            node
            for node in nodes
            if node.name not in self._reported_down and now - self._down_since.get(node.name, now) >= DOWN_FOR_S
        ]
        newly_up = [
            node
            for node in nodes
            if node.name in self._reported_down and now - self._up_since.get(node.name, now) >= UP_FOR_S
        ]
        self._reported_down.update(node.name for node in newly_down)
        self._reported_down.difference_update(node.name for node in newly_up)
        are_all_down = bool(nodes) and all(node.name in self._reported_down for node in nodes)
        if are_all_down and not self._is_all_down_reported:  # one event in place of one for each node
            reasons = "; ".join(f"{node.name}: {node.reason or 'no reason is known'}" for node in nodes[:4])
            more = f"; and {len(nodes) - 4} more" if len(nodes) > 4 else ""
            yield MeshEvent(EventKind.ALL_DOWN, None, f"no node of {state.mesh} can serve: {reasons}{more}")
        else:
            for node in newly_down:
                reason = f": {node.reason}" if node.reason else ""
                yield MeshEvent(EventKind.NODE_DOWN, node.name, f"{node.name} is down{reason}", node.tunnel.hint)
        self._is_all_down_reported = are_all_down
        for node in newly_up:
            yield MeshEvent(EventKind.NODE_UP, node.name, f"{node.name} is back")

    def _note_health(self, node: NodeState, now: float) -> None:
        """Notes since when the node is down or up. A node whose state is not known yet is neither."""
        if node.health is Health.DOWN:
            self._down_since.setdefault(node.name, now)
            self._up_since.pop(node.name, None)
        else:
            self._down_since.pop(node.name, None)
            if node.health.is_serving:
                self._up_since.setdefault(node.name, now)
            else:
                self._up_since.pop(node.name, None)

    def _forget_nodes(self, names: set[str]) -> None:
        """Forgets the nodes that are no part of the mesh any more, or that drain."""
        for times in (self._down_since, self._up_since):
            for name in times.keys() - names:
                del times[name]
        self._reported_down &= names


def _findings_of(state: MeshState) -> Iterator[Finding]:
    """The findings of the state that are events."""
    for finding in state.findings:
        if finding.code in FINDING_EVENTS:
            yield finding
    for node in state.nodes:
        if node.tunnel.error_code == "host-key-changed":
            message = node.tunnel.last_error or "the host's key has changed"
            yield Finding("host-key-changed", Severity.ERROR, node.name, message, node.tunnel.hint)
