"""The lines about what tunnel, mesh and gateway add."""

from __future__ import annotations

from gpumesh.bench.figures.routes.route_costs import RouteCost
from gpumesh.bench.figures.routes.route_differences import RouteDifference
from gpumesh.cli.views.bench_routes import route_lines
from tests.bench.example_results import result

COSTS = (RouteCost("oslo", "tunnel", 52.0, 1.234, 0.0), RouteCost("oslo", "mesh", 53.0, 1.8, 0.566))


def test_each_part_has_its_interval_and_the_control_is_last() -> None:
    differences = (
        RouteDifference("oslo", "tunnel again", "tunnel", 50, 0.0, -0.02, 0.02),
        RouteDifference("oslo", "mesh", "tunnel", 50, 0.6, 0.5, 0.7, is_clear=True),
        RouteDifference("oslo", "gateway", "tunnel", 50, 0.01, -0.03, 0.05, is_clear=False),
    )
    assert list(route_lines(result(routes=COSTS, route_differences=differences))) == [
        "oslo: 1.23 ms outside the server at p50 through the tunnel",
        "oslo: mesh adds 0.60 ms (0.50 to 0.70); gateway no clear difference, 0.01 ms (-0.03 to 0.05);"
        " A-A 0.00 ms (-0.02 to 0.02)",
    ]


def test_a_result_of_an_older_version_has_medians_only() -> None:
    assert list(route_lines(result(routes=COSTS)))[1] == "oslo: mesh adds 0.566 ms"
