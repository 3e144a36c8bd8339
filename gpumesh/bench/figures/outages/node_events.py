"""Finds the nodes that stopped serving during a stage, or served again, from what the mesh told meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.gpu_meter import GpuSample
from gpumesh.state import Health, NodeState


@dataclass(frozen=True, slots=True)
class HealthChange:
    """The health of a node from a moment on. ``at_s`` is on the clock of the watch that saw the change. ``reason`` is
    the mesh's text."""

    at_s: float
    node: str
    health: Health
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A node that did not serve for a part of a stage. ``from_s`` and ``to_s`` are seconds of the stage, as exact as
    the samples of the mesh's state are frequent; ``to_s`` is ``None`` if it did not serve at the end either.

    ``reason`` is the mesh's, or that the tunnel was opened anew between two samples.
    """

    node: str
    from_s: float
    to_s: float | None
    health: Health
    reason: str | None = None

    def describe(self) -> str:
        """One sentence: "iceland was down from 3.2 s to 5.1 s: …"."""
        end = "to the end" if self.to_s is None else f"to {self.to_s:.1f} s"
        text = f"{self.node} was {self.health} from {self.from_s:.1f} s {end}"
        return f"{text}: {self.reason}" if self.reason else text


def node_events(samples: Sequence[GpuSample], nodes: Sequence[str], start_s: float | None = None) -> list[NodeEvent]:
    """The events of these nodes in the samples of a stage, in the order of time. ``start_s``: when the stage began, on
    the samples' clock; ``None``: with the first sample.

    A node that never served in the stage has no event. A node that was away only between two samples is known by the
    reconnects of its tunnel.
    """
    if not samples:
        return []
    origin_s = samples[0].at_s if start_s is None else start_s
    events: list[NodeEvent] = []
    for name in nodes:
        states = [
            (max(sample.at_s - origin_s, 0.0), node)
            for sample in samples
            for node in sample.state.nodes
            if node.name == name
        ]
        if any(node.health.is_serving for _, node in states):
            events.extend(_events_of(states))
    return sorted(events, key=lambda event: event.from_s)


def _events_of(states: Sequence[tuple[float, NodeState]]) -> list[NodeEvent]:
    """The events of one node, from its state at each moment."""
    events: list[NodeEvent] = []
    away: NodeEvent | None = None
    _, last = states[0]
    for at_s, node in states:
        if not node.health.is_serving and away is None:
            away = NodeEvent(node.name, at_s, None, node.health, node.reason)
        elif node.health.is_serving and away is not None:
            events.append(NodeEvent(away.node, away.from_s, at_s, away.health, away.reason))
            away = None
        elif away is None and node.tunnel.reconnects > last.tunnel.reconnects:
            reason = node.tunnel.last_error or "its tunnel was opened anew"
            events.append(NodeEvent(node.name, at_s, at_s, Health.DOWN, reason))
        last = node
    if away is not None:
        events.append(away)
    return events
