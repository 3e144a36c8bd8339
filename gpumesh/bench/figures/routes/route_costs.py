"""Computes the cost of each route to a node. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.summary import StageResult


@dataclass(frozen=True, slots=True)
class RouteCost:
    """The cost of one route to a node: the p50 of its latencies, in ms.

    ``added_p50_ms`` is the difference from the first (shortest) route to the same node.
    """

    node: str
    route: str
    end_to_end_p50_ms: float | None
    outside_server_p50_ms: float | None
    added_p50_ms: float | None


def route_costs(stages: Sequence[StageResult]) -> tuple[RouteCost, ...]:
    """Computes the cost of each route, compared to the first route to the same node whose latency is known."""
    costs = []
    baselines_ms: dict[str, float] = {}  # the latency of the first route, by node
    for stage in stages:
        if stage.route is None or stage.node is None:
            continue
        end_to_end_ms, outside_ms = stage.latency.end_to_end.p50, stage.latency.outside_server.p50
        # The time outside the server is preferred: the server's own time varies more than the cost of a route.
        latency_ms = end_to_end_ms if outside_ms is None else outside_ms
        added_ms = None
        if latency_ms is not None:
            added_ms = latency_ms - baselines_ms.setdefault(stage.node, latency_ms)
        costs.append(RouteCost(stage.node, stage.route, end_to_end_ms, outside_ms, added_ms))
    return tuple(costs)
