"""Selects the nodes that `status` shows, by name and by label, and sorts them by name, health or a figure. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.errors import UsageError, unknown_node
from gpumesh.state import GpuState, Health, MeshState, NodeState, compute_totals, free_mib


class SortKey(StrEnum):
    """The values of `status --sort`. ``trouble``: the nodes that are down, then the degraded ones, then all others in
    the order of mesh.yaml. ``config``: the order of mesh.yaml. ``name``: the alphabet. ``health``: the worst first. All
    others are figures: the highest first."""

    TROUBLE = "trouble"
    CONFIG = "config"
    NAME = "name"
    HEALTH = "health"
    MEMORY = "memory"
    FREE = "free"
    UTIL = "util"
    TEMP = "temp"
    POWER = "power"
    TOKENS = "tokens"
    BUSY = "busy"
    RTT = "rtt"


_WORST_FIRST = (Health.DOWN, Health.DEGRADED, Health.UNKNOWN, Health.DRAINING, Health.HEALTHY)

# Only these are moved: a node that starts, or that a person drains, keeps its place in a live view.
_TROUBLE_FIRST = {Health.DOWN: 0, Health.DEGRADED: 1}


def health_rank(node: NodeState) -> int:
    """The place of the node's health among all healths: 0 for the worst."""
    return _WORST_FIRST.index(node.health)


def select_nodes(state: MeshState, names: Sequence[str] = (), labels: Sequence[str] = ()) -> MeshState:
    """Only the nodes with one of these names (``*`` and ``?`` as in a shell) and all of these labels (``key=value``,
    or ``key`` for any value), with the totals and findings of these nodes. Raises UsageError when no node remains."""
    selected_names = _match_names(names, [node.name for node in state.nodes])
    nodes = tuple(node for node in state.nodes if node.name in selected_names)
    for label in labels:
        nodes = tuple(node for node in nodes if _has_label(node, label))
    if labels and not nodes:
        raise UsageError(f"no node has {' and '.join(labels)}", hint=_known_labels(state))
    if len(nodes) == len(state.nodes):
        return state
    selected_names = {node.name for node in nodes}
    # A finding stays if it is about at least one selected node.
    findings = tuple(finding for finding in state.findings if selected_names & {finding.node, *finding.nodes})
    return replace(state, nodes=nodes, totals=compute_totals(nodes), findings=findings)


def _match_names(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that match one of the patterns; if there are no patterns, all names. Raises UsageError for a pattern
    that matches no name."""
    if not patterns:
        return set(names)
    matches: set[str] = set()
    for pattern in patterns:
        new_matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not new_matches:
            raise unknown_node(pattern, names)
        matches.update(new_matches)
    return matches


def _has_label(node: NodeState, label: str) -> bool:
    """Whether the node has the label ``key=value``; for ``key`` alone, whether it has the key with any value."""
    key, equals_sign, value = label.partition("=")
    if equals_sign:
        return (key, value) in node.labels
    return any(key == node_key for node_key, _ in node.labels)


def _known_labels(state: MeshState) -> str:
    """A hint that lists the labels of all nodes."""
    labels = sorted({f"{key}={value}" for node in state.nodes for key, value in node.labels})
    return f"the labels are: {', '.join(labels)}" if labels else "no node in mesh.yaml has `labels`"


@dataclass(frozen=True, slots=True)
class ViewSelection:
    """Which nodes of the mesh are shown, in which order, and whether their processes are shown too (``verbose``)."""

    names: Sequence[str] = ()
    labels: Sequence[str] = ()
    sort: SortKey = SortKey.TROUBLE
    verbose: bool = False

    def apply(self, state: MeshState) -> MeshState:
        """The state with only the nodes that are shown, sorted. Raises UsageError when no node remains."""
        return sort_nodes(select_nodes(state, self.names, self.labels), self.sort)


def sort_nodes(state: MeshState, key: SortKey) -> MeshState:
    """The state with its nodes sorted. Nodes whose figure is unknown come last, and nodes with equal figures keep the
    order of mesh.yaml."""
    if key is SortKey.CONFIG:
        return state
    return replace(state, nodes=tuple(sorted(state.nodes, key=_ORDERS[key])))


def _highest_first(figure: Callable[[NodeState], float | None]) -> Callable[[NodeState], tuple[bool, float]]:
    """A key for ``sorted`` that puts the node with the highest figure first. ``sorted`` puts False before True, so
    nodes whose figure is unknown come last."""

    def sort_value(node: NodeState) -> tuple[bool, float]:
        value = figure(node)
        is_unknown = value is None
        return is_unknown, -(value or 0.0)  # negative, because ``sorted`` puts the lowest value first

    return sort_value


def _over_gpus(
    figure: Callable[[GpuState], float | None], combine: Callable[[list[float]], float]
) -> Callable[[NodeState], float | None]:
    """A function that combines the figures of a node's GPUs into one figure of the node. It returns ``None`` when no
    GPU's figure is known."""

    def node_figure(node: NodeState) -> float | None:
        figures = [figure(gpu) for gpu in node.gpus or ()]
        known_figures = [value for value in figures if value is not None]
        return combine(known_figures) if known_figures else None

    return node_figure


def _used_share(gpu: GpuState) -> float | None:
    """The share of the GPU's memory that is in use, from 0 to 1; ``None`` if it is not known."""
    if gpu.memory_used_mib is None or not gpu.memory_total_mib:  # the total is unknown or 0
        return None
    return gpu.memory_used_mib / gpu.memory_total_mib


# By sort key: the function that ``sorted`` gets as its key.
_ORDERS: dict[SortKey, Callable[[NodeState], tuple[bool, float] | str | int]] = {
    SortKey.TROUBLE: lambda node: _TROUBLE_FIRST.get(node.health, len(_TROUBLE_FIRST)),
    SortKey.NAME: lambda node: node.name,
    SortKey.HEALTH: health_rank,
    SortKey.MEMORY: _highest_first(_over_gpus(_used_share, max)),
    SortKey.FREE: _highest_first(_over_gpus(free_mib, sum)),
    SortKey.UTIL: _highest_first(_over_gpus(lambda gpu: gpu.utilization_pct, max)),
    SortKey.TEMP: _highest_first(_over_gpus(lambda gpu: gpu.temperature_c, max)),
    SortKey.POWER: _highest_first(_over_gpus(lambda gpu: gpu.power_w, sum)),
    SortKey.TOKENS: _highest_first(lambda node: node.backend.tokens_per_s),
    SortKey.BUSY: _highest_first(lambda node: float(node.load.in_flight + node.load.queued)),
    SortKey.RTT: _highest_first(lambda node: node.tunnel.rtt_ms),
}
