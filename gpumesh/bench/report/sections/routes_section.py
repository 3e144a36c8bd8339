"""The section of the report about what each part of the way to a node costs."""

from __future__ import annotations

from gpumesh.bench.figures.routes.route_differences import RouteDifference
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.route_names import is_control

_EXPLANATION = (
    "Differences of requests of the same round, in ms: the Hodges-Lehmann estimate with its 95 % interval (Wilcoxon's "
    "signed ranks). The shortest route is measured twice: a difference whose interval overlaps that A-A difference "
    "counts as none."
)


def routes_section(result: BenchResult) -> str:
    """The section of the report about the routes to a node: what each part of a route adds, and the figures of each
    route. Empty unless the scenario is ``overhead``."""
    differences = html_table(
        ["node and part", "adds ms", "95 % interval", "rounds", ""],
        (_difference_row(difference) for difference in result.route_differences),
    )
    if differences:
        differences = f'<p class="sub">{escape_text(_EXPLANATION)}</p>' + differences
    table = html_table(
        ["node and route", "end-to-end p50 ms", "outside the server p50 ms", "added p50 ms"],
        (
            [
                escape_text(f"{cost.node} via {cost.route}"),
                format_number(cost.end_to_end_p50_ms),
                format_number(cost.outside_server_p50_ms),
                format_number(cost.added_p50_ms),
            ]
            for cost in result.routes
        ),
    )
    return "<h2>What the way costs</h2>" + differences + table if table else ""


def _difference_row(difference: RouteDifference) -> list[str]:
    """The cells of one difference."""
    interval = "too few rounds"
    if difference.low_ms is not None and difference.high_ms is not None:
        interval = f"{difference.low_ms:.2f} to {difference.high_ms:.2f}"
    verdict = "no clear difference" if difference.is_noise else ""
    part = "A-A" if is_control(difference.route) else difference.route
    return [
        escape_text(f"{difference.node}: {part} over {difference.base}"),
        f"{difference.added_ms:.2f}",
        interval,
        str(difference.rounds),
        verdict,
    ]
