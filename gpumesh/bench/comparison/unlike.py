"""Finds what makes two results incomparable: different things were measured. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum

from gpumesh.bench.figures.summary import stage_label
from gpumesh.bench.results.result import BenchResult, NodeEnvironment
from gpumesh.text.printable import printable

# The number of requests changes only how sure a figure is.
_SETTINGS_THAT_MAY_DIFFER = frozenset({"requests"})
# The properties of a node that must be equal, with the words for them.
_NODE_PROPERTIES = (
    ("gpus", "GPUs"),
    ("driver", "driver"),
    ("backend", "server"),
    ("version", "server version"),
    ("transport", "transport"),
    ("parallel", "parallel requests"),
)


def find_unlike(a: BenchResult, b: BenchResult) -> Iterator[str]:
    """Yields a sentence for each condition that differs. A property of a node that a result does not know is equal."""
    if a.scenario is not b.scenario:
        yield f"the scenarios differ: {a.scenario} and {b.scenario}"
    for field in dataclasses.fields(a.settings):
        value_a, value_b = getattr(a.settings, field.name), getattr(b.settings, field.name)
        if value_a != value_b and field.name not in _SETTINGS_THAT_MAY_DIFFER:
            yield f"not the same {field.name.replace('_', ' ')}: {_text(value_a)} and {_text(value_b)}"
    if a.objective != b.objective:
        yield f"not the same SLO: {_slo_text(a)} and {_slo_text(b)}"
    if a.simulated != b.simulated:
        yield f"one of the two was measured on simulated hosts: {'A' if a.simulated else 'B'}"
    yield from _unlike_stages(a, b)
    yield from _unlike_nodes(a, b)


def _slo_text(result: BenchResult) -> str:
    return f"TTFT {result.objective.ttft_ms:g} ms, TPOT {result.objective.tpot_ms:g} ms"


def _unlike_stages(a: BenchResult, b: BenchResult) -> Iterator[str]:
    """Stages of the same name with another number of requests in flight, or on another way to the servers."""
    stages_b = {stage_label(stage): stage for stage in b.stages}
    for stage_a in a.stages:
        stage_b = stages_b.get(stage_label(stage_a))
        if stage_b is None:
            continue
        label = printable(stage_label(stage_a))
        level_a, level_b = stage_a.concurrency, stage_b.concurrency
        if level_a != level_b:
            yield f"stage {label}: not the same concurrency: {_text(level_a)} and {_text(level_b)}"
        if stage_a.conditions and stage_b.conditions and stage_a.conditions.via is not stage_b.conditions.via:
            yield f"stage {label}: not sent the same way: {stage_a.conditions.via} and {stage_b.conditions.via}"


def _unlike_nodes(a: BenchResult, b: BenchResult) -> Iterator[str]:
    """Nodes that only one result has, and nodes that are not the same."""
    nodes_a = {node.name: node for node in a.environment.nodes}
    nodes_b = {node.name: node for node in b.environment.nodes}
    for name, node in nodes_a.items():
        if name in nodes_b:
            yield from _unlike_properties(node, nodes_b[name])
    for label, nodes, other_nodes in (("A", nodes_a, nodes_b), ("B", nodes_b, nodes_a)):
        for name in nodes:
            if name not in other_nodes:
                yield f"node {printable(name)} is only in {label}"


def _unlike_properties(a: NodeEnvironment, b: NodeEnvironment) -> Iterator[str]:
    """The properties of one node that both results know, and that differ."""
    for name, words in _NODE_PROPERTIES:
        value_a, value_b = getattr(a, name), getattr(b, name)
        if value_a is not None and value_b is not None and value_a != value_b:
            yield f"node {printable(a.name)}: not the same {words}: {_text(value_a)} and {_text(value_b)}"


def _text(value: object) -> str:
    """A value as a person reads it. It may come from a host."""
    if isinstance(value, tuple):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, Enum):
        return str(value.value)
    return "none" if value is None else printable(str(value))
