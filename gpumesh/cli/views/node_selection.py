"""Selects and sorts nodes of a mesh for `status`: by name, by label, by a figure. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.errors import UsageError, unknown_node
from gpumesh.state import GpuState, Health, MeshState, NodeState, compute_totals, free_mib


class SortKey(StrEnum):
    """``config``: the order of mesh.yaml. ``name``: by the alphabet. ``health``: the worst first. All others are
    figures: the highest first."""

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


def health_rank(node: NodeState) -> int:
    """0 for the worst health."""
    return _WORST_FIRST.index(node.health)


def select_nodes(state: MeshState, names: Sequence[str] = (), labels: Sequence[str] = ()) -> MeshState:
    """Only the nodes with one of these names (``*`` and ``?`` as in a shell) and all of these labels (``key=value``,
    or ``key`` for any value), with the totals and findings of these nodes. Raises UsageError when no node remains."""
    nodes = state.nodes
    if names:
        for name in names:
            if not any(fnmatch.fnmatchcase(node.name, name) for node in state.nodes):
                raise unknown_node(name, (node.name for node in state.nodes))
        nodes = tuple(node for node in nodes if any(fnmatch.fnmatchcase(node.name, name) for name in names))
    for label in labels:
        nodes = tuple(node for node in nodes if _has_label(node, label))
    if labels and not nodes:
        raise UsageError(f"no node has {' and '.join(labels)}", hint=_known_labels(state))
    if len(nodes) == len(state.nodes):
        return state
    selected_names = {node.name for node in nodes}
    findings = tuple(
        finding
        for finding in state.findings
        if finding.node in selected_names or not selected_names.isdisjoint(finding.nodes)
    )
    return replace(state, nodes=nodes, totals=compute_totals(nodes), findings=findings)


def _has_label(node: NodeState, label: str) -> bool:
    key, equals, value = label.partition("=")
    return any(key == name and (not equals or value == own_value) for name, own_value in node.labels)


def _known_labels(state: MeshState) -> str:
    labels = sorted({f"{key}={value}" for node in state.nodes for key, value in node.labels})
    return f"the labels are: {', '.join(labels)}" if labels else "no node in mesh.yaml has `labels`"


@dataclass(frozen=True, slots=True)
class ViewSelection:
    """Which nodes of the mesh are shown, in which order, and whether their processes are shown too (``verbose``)."""

    names: Sequence[str] = ()
    labels: Sequence[str] = ()
    sort: SortKey = SortKey.CONFIG
    verbose: bool = False

    def apply(self, state: MeshState) -> MeshState:
        """Raises UsageError when no node remains."""
        return sort_nodes(select_nodes(state, self.names, self.labels), self.sort)


def sort_nodes(state: MeshState, key: SortKey) -> MeshState:
    """Nodes whose figure is unknown come last. Nodes with equal figures keep the order of mesh.yaml."""
    if key is SortKey.CONFIG:
        return state
    return replace(state, nodes=tuple(sorted(state.nodes, key=_ORDERS[key])))


def _highest_first(figure: Callable[[NodeState], float | None]) -> Callable[[NodeState], tuple[bool, float]]:
    """A key for ``sorted``. True comes after False, so nodes whose figure is unknown come last."""

    def order(node: NodeState) -> tuple[bool, float]:
        value = figure(node)
        return value is None, -(value or 0.0)

    return order


def _over_gpus(
    figure: Callable[[GpuState], float | None], combine: Callable[[list[float]], float]
) -> Callable[[NodeState], float | None]:
    """A figure of a node, combined from the figures of its GPUs; ``None`` when no GPU's figure is known."""

    def node_figure(node: NodeState) -> float | None:
        values = [value for gpu in node.gpus or () if (value := figure(gpu)) is not None]
        return combine(values) if values else None

    return node_figure


def _used_share(gpu: GpuState) -> float | None:
    if gpu.memory_used_mib is None or not gpu.memory_total_mib:
        return None
    return gpu.memory_used_mib / gpu.memory_total_mib


_Order = Callable[[NodeState], tuple[bool, float] | str | int]
_ORDERS: dict[SortKey, _Order] = {
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
