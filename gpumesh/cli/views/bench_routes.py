"""The lines of `bench` about what tunnel, mesh and gateway add to a request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gpumesh.bench.figures.routes.route_differences import RouteDifference
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.route_names import DIRECT, is_control


def route_lines(result: BenchResult) -> Iterator[str]:
    """Yields two lines for each node whose routes were compared. ``p50`` is the median.

    A result of an older version has no differences with intervals, only differences of medians.
    """
    for node, costs in itertools.groupby(result.routes, key=lambda cost: cost.node):
        shortest, *others = costs  # the result lists the routes of a node from the shortest on
        outside = format_number(shortest.outside_server_p50_ms)
        way = "without a tunnel" if shortest.route == DIRECT else f"through the {shortest.route}"
        yield f"{node}: {outside} ms outside the server at p50 {way}"
        differences = [difference for difference in result.route_differences if difference.node == node]
        if not differences:
            parts = [f"{cost.route} adds {format_number(cost.added_p50_ms)} ms" for cost in others]
            yield f"{node}: {'; '.join(parts)}"
            continue
        added = [_describe(difference) for difference in differences if not is_control(difference.route)]
        control = [_amount(difference) for difference in differences if is_control(difference.route)]
        yield f"{node}: {'; '.join([*added, *(f'A-A {amount}' for amount in control)])}"


def _describe(difference: RouteDifference) -> str:
    """What a part of the way adds, with its interval: "tunnel adds 0.60 ms (0.50 to 0.70)"."""
    if difference.is_noise:
        return f"{difference.route} no clear difference, {_amount(difference)}"
    return f"{difference.route} adds {_amount(difference)}"


def _amount(difference: RouteDifference) -> str:
    """The difference with its interval."""
    interval = "too few rounds"
    if difference.low_ms is not None and difference.high_ms is not None:
        interval = f"{difference.low_ms:.2f} to {difference.high_ms:.2f}"
    return f"{difference.added_ms:.2f} ms ({interval})"
