"""Merges the progress of one operation (pull, create, push) on several nodes into one progress. Pure.

Ollama's clients draw a bar for each ``digest``. The length of the bar is the first ``total`` that they see. So the
total of a layer never changes, and its ``completed`` is the mean over the nodes, which only grows. A status that comes
before the layers is reported when the first node has reported it; a status after the layers, when all nodes have
reported it. The status ``success`` is not reported: the caller writes it at the very end. A node that has failed does
not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpumesh.mesh.models.store_answers import SUCCESS, StoreStep

MAX_STEPS_PER_NODE = 1000  # of one node: so many layers, and so many different statuses; further entries are dropped


@dataclass(slots=True)
class _NodeProgress:
    """The progress of one node. ``layers``: the completed bytes by digest. ``statuses``: the statuses that concern no
    layer, as keys (an ordered set). ``new_layers``: how many layers this node was the first to name. ``failure``: the
    reason if it failed, else ``None``."""

    layers: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, None] = field(default_factory=dict)
    new_layers: int = 0
    done: bool = False
    failure: str | None = None


@dataclass(slots=True)
class _Layer:
    """A layer of the model. ``total`` is its size in bytes. ``reported_bytes``: the completed bytes of the last report;
    -1 before the first report."""

    status: str
    total: int
    reported_bytes: int = -1


@dataclass(slots=True)
class _Status:
    """A status of the merged progress, such as ``pulling manifest``. It is reported when the first node has reported it
    (``at_first_node``), or else when all nodes have."""

    at_first_node: bool
    reported: bool = False


class MergedProgress:
    """The merged progress of ``nodes``: ``add_step`` takes each node's steps, in order, and ``take_steps`` returns the
    new steps of the merged progress."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self._nodes = {name: _NodeProgress() for name in nodes}
        self._layers: dict[str, _Layer] = {}  # by digest
        self._statuses: dict[str, _Status] = {}  # by the text of the status

    def __repr__(self) -> str:
        return f"<MergedProgress {len(self._nodes)} nodes, {len(self.done)} done, {len(self.failures)} failed>"

    def add_step(self, node: str, step: StoreStep) -> None:
        """Adds one step of a node: its success, the completed bytes of a layer, or another status."""
        progress = self._nodes[node]
        if step.status == SUCCESS:
            progress.done = True
        elif step.digest is not None and step.total_bytes is not None:
            self._add_layer(progress, step.digest, step.status, step.total_bytes, step.completed_bytes or 0)
        elif len(progress.statuses) < MAX_STEPS_PER_NODE:
            progress.statuses[step.status] = None
            comes_before_layers = not progress.layers
            self._statuses.setdefault(step.status, _Status(at_first_node=comes_before_layers))

    def _add_layer(self, progress: _NodeProgress, digest: str, status: str, total: int, completed: int) -> None:
        """Notes how many bytes of a layer a node has. ``total`` is used only if no node has named the layer before,
        because the total of a layer must never change. Drops further new layers of a node that has named too many."""
        if digest not in self._layers:
            if progress.new_layers >= MAX_STEPS_PER_NODE:
                return
            progress.new_layers += 1
            self._layers[digest] = _Layer(status, total)
        bounded = min(completed, self._layers[digest].total)
        progress.layers[digest] = max(progress.layers.get(digest, 0), bounded)  # never less than before

    def mark_failed(self, node: str, reason: str) -> None:
        self._nodes[node].failure = reason

    def add_note(self, status: str) -> None:
        """Adds a status of the mesh's own, which no node has reported. It is among the next steps."""
        self._statuses.setdefault(status, _Status(at_first_node=True))

    @property
    def failures(self) -> dict[str, str]:
        """The reasons by node, of the nodes that have failed."""
        return {name: node.failure for name, node in self._nodes.items() if node.failure is not None}

    @property
    def done(self) -> tuple[str, ...]:
        """The nodes on which the operation has succeeded."""
        return tuple(name for name, node in self._nodes.items() if node.done)

    def take_steps(self) -> list[StoreStep]:
        """The steps that are new since the last call: first the statuses before the layers, then the layers, then the
        statuses after them."""
        counted_nodes = [node for node in self._nodes.values() if node.failure is None]
        unreported = {status: state for status, state in self._statuses.items() if not state.reported}
        steps = [self._mark_reported(status) for status, state in unreported.items() if state.at_first_node]
        for digest, layer in self._layers.items():
            # A node that is done has the whole layer, even if it never named it.
            completed_by_node = [layer.total if node.done else node.layers.get(digest, 0) for node in counted_nodes]
            mean = sum(completed_by_node) // len(completed_by_node) if completed_by_node else 0
            if mean > layer.reported_bytes:
                layer.reported_bytes = mean
                steps.append(StoreStep(layer.status, digest, mean, layer.total))
        late_statuses = [status for status, state in unreported.items() if not state.at_first_node]
        for status in late_statuses:
            # A node that is done has passed this status, even if it never reported it.
            all_have_passed = all(node.done or status in node.statuses for node in counted_nodes)
            if counted_nodes and all_have_passed:  # if all nodes have failed, no node is counted
                steps.append(self._mark_reported(status))
        return steps

    def _mark_reported(self, status: str) -> StoreStep:
        """Returns the step that reports this status, and notes that it need not be reported again."""
        self._statuses[status].reported = True
        return StoreStep(status)
