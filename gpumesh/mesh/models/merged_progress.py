"""The progress of one operation on several nodes (pull, create, push), merged into the progress of one. Pure.

Ollama's clients draw a bar for each ``digest``, as long as the first ``total`` that they see. So the total of a layer
never changes, and its ``completed`` is the mean over the nodes, which only grows. A status before the layers is passed
on when the first node says it, a status after them when the last node does. ``success`` is left to the caller, who may
have more to do before it is true. A node that failed holds up no other node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpumesh.mesh.models.store_answers import SUCCESS, StoreStep

MAX_STEPS_PER_NODE = 1000  # layers, and different statuses, that one node brings up: further ones are dropped


@dataclass(slots=True)
class _NodeProgress:
    layers: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, None] = field(default_factory=dict)
    new_layers: int = 0
    done: bool = False
    failure: str | None = None


@dataclass(slots=True)
class _Layer:
    """``reported``: the bytes that were passed on last; -1 before the first time."""

    status: str
    total: int
    reported: int = -1


@dataclass(slots=True)
class _Status:
    """``at_first_node``: it is passed on when the first node says it, else when the last one does."""

    at_first_node: bool
    reported: bool = False


class MergedProgress:
    """``add_step`` takes a node's steps in the order in which they came; ``take_steps`` gives what is new in all."""

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
        """A status of our own."""
        self._statuses.setdefault(status, _Status(at_first_node=True))

    @property
    def failures(self) -> dict[str, str]:
        """The reasons of the nodes that failed."""
        return {name: node.failure for name, node in self._nodes.items() if node.failure is not None}

    @property
    def done(self) -> tuple[str, ...]:
        return tuple(name for name, node in self._nodes.items() if node.done)

    def take_steps(self) -> list[StoreStep]:
        """What is new since the last call."""
        live = [node for node in self._nodes.values() if node.failure is None]
        steps = [
            self._report(status)
            for status, state in self._statuses.items()
            if state.at_first_node and not state.reported
        ]
        for digest, layer in self._layers.items():
            shares = [layer.total if node.done else node.layers.get(digest, 0) for node in live]
            completed = max(sum(shares) // len(shares) if shares else 0, layer.reported)
            if completed > layer.reported:
                layer.reported = completed
                steps.append(StoreStep(layer.status, digest, completed, layer.total))
        for status, state in self._statuses.items():
            if not state.reported and live and all(node.done or status in node.statuses for node in live):
                steps.append(self._report(status))
        return steps

    def _report(self, status: str) -> StoreStep:
        self._statuses[status].reported = True
        return StoreStep(status)
