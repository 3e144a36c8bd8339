"""Computes how well a mesh uses its nodes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.workload.stages import StageKind


@dataclass(frozen=True, slots=True)
class Scaling:
    """How well the mesh uses its nodes. ``efficiency``: the mesh's output tokens/s ÷ the sum of the nodes alone.

    1 is perfect. ``nodes`` are the names and rates of the nodes alone. All rates are ``Rates.loaded_tokens_per_s``, or
    ``Rates.output_tokens_per_s`` if one of these is unknown.
    """

    mesh_tokens_per_s: float
    sum_tokens_per_s: float
    efficiency: float
    nodes: tuple[tuple[str, float], ...] = field(default_factory=tuple)


def scaling(stages: Sequence[StageResult]) -> Scaling | None:
    """Compares the output rate of the mesh's last stage with that of the nodes alone.

    ``None`` if there are fewer than two nodes or no stage of the mesh, or if one of them produced no tokens.
    """
    # Left out: a stage with routes, which measures the routes, and a stage that was disturbed.
    node_stages = [stage for stage in stages if stage.kind is StageKind.NODE and stage.node and stage.route is None]
    mesh_stages = [stage for stage in stages if stage.kind is StageKind.MESH and not stage.disturbance]
    if not mesh_stages or len(node_stages) < 2:  # a single node cannot scale
        return None
    compared = [*node_stages, mesh_stages[-1]]
    rates = [stage.rates.loaded_tokens_per_s for stage in compared]
    if not all(rates):  # one is unknown or 0: so all are replaced, because only rates of one kind can be compared
        rates = [stage.rates.output_tokens_per_s for stage in compared]
    known_rates = [value for value in rates if value]
    if len(known_rates) != len(compared):  # a stage produced no tokens
        return None
    *node_rates, mesh_rate = known_rates
    sum_of_nodes = math.fsum(node_rates)
    by_node = tuple((stage.node or "", value) for stage, value in zip(node_stages, node_rates, strict=True))
    return Scaling(mesh_rate, sum_of_nodes, mesh_rate / sum_of_nodes, by_node)
