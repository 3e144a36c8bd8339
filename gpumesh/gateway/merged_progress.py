"""Many nodes' progress as one, in Ollama's own lines (``pull``, ``create``, ``push``). Pure.

Clients draw a bar for each ``digest``, from the first ``total`` that they see: so a layer's total is said once and for
all, and its ``completed`` is the mean over the nodes, which only grows. What stands before the layers is said when the
first node says it, what comes after them when the last one does; ``success`` is left to the caller, who may have more
to do before it is true. A node that failed holds up nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.printable import printable

MAX_LINES_PER_NODE = 1000  # layers, and different words, that one node brings up: what is beyond is not told
MAX_STATUS_CHARS = 200


@dataclass(slots=True)
class _Node:
    layers: dict[str, int] = field(default_factory=dict)
    said: dict[str, None] = field(default_factory=dict)
    new_layers: int = 0
    done: bool = False
    failure: str | None = None


@dataclass(slots=True)
class _Layer:
    status: str
    total: int
    told: int = -1


@dataclass(slots=True)
class _Words:
    """``first``: told when the first node says it, not the last."""

    first: bool
    told: bool = False


class MergedProgress:
    """``feed_line`` takes a node's lines in the order in which they came, ``take_lines`` gives what is new for the
    client."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self._nodes = {name: _Node() for name in nodes}
        self._layers: dict[str, _Layer] = {}
        self._words: dict[str, _Words] = {}

    def feed_line(self, node: str, entry: Mapping[str, Any]) -> None:
        one = self._nodes[node]
        error = entry.get("error")
        if error:
            one.failure = printable(error if isinstance(error, str) else "an error without words", MAX_STATUS_CHARS)
            return
        status = safe_json.as_text(entry.get("status"))
        if status is None:
            return
        if status == "success":
            one.done = True
            return
        status = printable(status, MAX_STATUS_CHARS)
        digest, total = safe_json.as_text(entry.get("digest")), safe_json.as_count(entry.get("total"))
        if digest is not None and total:
            self._layer(
                one, printable(digest, MAX_STATUS_CHARS), status, total, safe_json.as_count(entry.get("completed")) or 0
            )
        elif len(one.said) < MAX_LINES_PER_NODE:
            one.said[status] = None
            self._words.setdefault(status, _Words(first=not one.layers))

    def _layer(self, one: _Node, digest: str, status: str, total: int, completed: int) -> None:
        if digest not in self._layers:
            if one.new_layers >= MAX_LINES_PER_NODE:
                return
            one.new_layers += 1
            self._layers[digest] = _Layer(status, total)
        one.layers[digest] = max(one.layers.get(digest, 0), min(completed, self._layers[digest].total))

    def mark_failed(self, node: str, words: str) -> None:
        self._nodes[node].failure = words

    def add_note(self, words: str) -> None:
        """A line of our own."""
        self._words.setdefault(words, _Words(first=True))

    @property
    def failures(self) -> dict[str, str]:
        return {name: node.failure for name, node in self._nodes.items() if node.failure is not None}

    @property
    def done(self) -> tuple[str, ...]:
        return tuple(name for name, node in self._nodes.items() if node.done)

    def take_lines(self) -> list[dict[str, Any]]:
        live = [node for node in self._nodes.values() if node.failure is None]
        lines = [self._tell(status) for status, words in self._words.items() if words.first and not words.told]
        for digest, layer in self._layers.items():
            shares = [layer.total if node.done else node.layers.get(digest, 0) for node in live]
            completed = max(sum(shares) // len(shares) if shares else 0, layer.told)
            if completed > layer.told:
                layer.told = completed
                lines.append({"status": layer.status, "digest": digest, "total": layer.total, "completed": completed})
        for status, words in self._words.items():
            if not words.told and live and all(node.done or status in node.said for node in live):
                lines.append(self._tell(status))
        return lines

    def _tell(self, status: str) -> dict[str, Any]:
        self._words[status].told = True
        return {"status": status}
