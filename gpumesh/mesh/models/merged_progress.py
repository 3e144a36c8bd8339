"""Merges the progress of one operation (pull, create, push) on several nodes into one progress. Pure.

Ollama's clients draw a bar for each ``digest``. The length of the bar is the first ``total`` that they see. So the
total of a layer never changes, and its ``completed`` is the mean over the nodes, which only grows. A status that comes
before the layers is reported when the first node says it, a status after the layers when all nodes have said it. The
status ``success`` is not reported: the caller writes it, after it has done the rest. A node that has failed does not
count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpumesh.mesh.models.store_answers import SUCCESS, StoreStep

MAX_STEPS_PER_NODE = 1000  # the layers, and the different statuses, of one node; further ones are dropped


@dataclass(slots=True)
class _NodeProgress:
    """``layers``: the completed bytes, by digest. ``new_layers``: how many layers this node was the first to name."""

    layers: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, None] = field(default_factory=dict)
    new_layers: int = 0
    done: bool = False
    failure: str | None = None


@dataclass(slots=True)
class _Layer:
    """``total`` in bytes. ``reported_bytes``: the completed bytes of the last report; -1 before the first report."""

    status: str
    total: int
    reported_bytes: int = -1


@dataclass(slots=True)
class _Status:
    """``at_first_node``: the status is reported when the first node says it, else when all nodes have said it."""

    at_first_node: bool
    reported: bool = False


class MergedProgress:
    """``add_step`` takes each node's steps, in order; ``take_steps`` returns the new steps of the merged progress."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self._nodes = {name: _NodeProgress() for name in nodes}
        self._layers: dict[str, _Layer] = {}
        self._statuses: dict[str, _Status] = {}

    def __repr__(self) -> str:
        return f"<MergedProgress {len(self._nodes)} nodes, {len(self.done)} done, {len(self.failures)} failed>"

    def add_step(self, node: str, step: StoreStep) -> None:
        progress = self._nodes[node]
        if step.status == SUCCESS:
            progress.done = True
        elif step.digest is not None and step.total_bytes is not None:
            self._add_layer(progress, step.digest, step.status, step.total_bytes, step.completed_bytes or 0)
        elif len(progress.statuses) < MAX_STEPS_PER_NODE:
            progress.statuses[step.status] = None
            self._statuses.setdefault(step.status, _Status(at_first_node=not progress.layers))

    def _add_layer(self, progress: _NodeProgress, digest: str, status: str, total: int, completed: int) -> None:
        if digest not in self._layers:
            if progress.new_layers >= MAX_STEPS_PER_NODE:
                return
            progress.new_layers += 1
            self._layers[digest] = _Layer(status, total)
        progress.layers[digest] = max(progress.layers.get(digest, 0), min(completed, self._layers[digest].total))

    def mark_failed(self, node: str, reason: str) -> None:
        self._nodes[node].failure = reason

    def add_note(self, status: str) -> None:
        """Adds a status that no node said."""
        self._statuses.setdefault(status, _Status(at_first_node=True))

    @property
    def failures(self) -> dict[str, str]:
        """The reasons by node, of the nodes that have failed."""
        return {name: node.failure for name, node in self._nodes.items() if node.failure is not None}

    @property
    def done(self) -> tuple[str, ...]:
        return tuple(name for name, node in self._nodes.items() if node.done)

    def take_steps(self) -> list[StoreStep]:
        """The steps that are new since the last call."""
        counted_nodes = [node for node in self._nodes.values() if node.failure is None]
        steps = [
            self._mark_reported(status)
            for status, state in self._statuses.items()
            if state.at_first_node and not state.reported
        ]
        for digest, layer in self._layers.items():
            # A node that is done has the whole layer, even if it never named it.
            completed_by_node = [layer.total if node.done else node.layers.get(digest, 0) for node in counted_nodes]
            mean = sum(completed_by_node) // len(completed_by_node) if completed_by_node else 0
            if mean > layer.reported_bytes:
                layer.reported_bytes = mean
                steps.append(StoreStep(layer.status, digest, mean, layer.total))
        for status, state in self._statuses.items():
            if (
                not state.reported
                and counted_nodes
                and all(node.done or status in node.statuses for node in counted_nodes)
            ):
                steps.append(self._mark_reported(status))
        return steps

    def _mark_reported(self, status: str) -> StoreStep:
        self._statuses[status].reported = True
        return StoreStep(status)
