"""What each part of a route adds, from made-up requests whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from gpumesh.bench.figures.routes.route_differences import RouteDifference, route_differences
from gpumesh.bench.load.samples import LoadSample, StageRun
from gpumesh.bench.workload.stages import PlannedRequest, StageKind
from tests.bench.example_results import CHAT, failed_record, make_stage_run, record, stage

ADDED_MS = {"direct": 0.0, "direct again": 0.0, "tunnel": 0.6, "mesh": 0.8, "gateway": 0.6}


def measured(
    routes: tuple[str, ...], rounds: int, *, server_ms: float | None = 50.0, drift_ms: float = 1.0
) -> StageRun:
    """Requests that take 5 ms outside the server, and what their route adds. The way becomes slower all the time."""
    rng, records, planned = Random(3), list[LoadSample](), list[PlannedRequest]()
    for number in range(rounds):
        for route in routes:
            latency_ms = 5.0 + (server_ms or 0.0) + number * drift_ms + ADDED_MS[route] + rng.gauss(0, 0.05)
            records.append(record(len(records), ttft_ms=latency_ms, tokens=1, server_ms=server_ms, route=route))
            planned.append(PlannedRequest(CHAT, "iceland", route=route))
    of = replace(stage("iceland", kind=StageKind.NODE, node="iceland"), requests=tuple(planned))
    return make_stage_run(*records, of=of)


def by_route(run: StageRun) -> dict[str, RouteDifference]:
    return {difference.route: difference for difference in route_differences(run)}


@pytest.mark.parametrize("server_ms", [50.0, None])
def test_each_part_is_found_although_the_way_drifts(server_ms: float | None) -> None:
    found = by_route(measured(("direct", "direct again", "tunnel", "mesh", "gateway"), 40, server_ms=server_ms))
    assert [(one.route, one.base) for one in found.values()] == [
        ("direct again", "direct"),
        ("tunnel", "direct"),
        ("mesh", "tunnel"),
        ("gateway", "tunnel"),
    ]
    for route, truth in (("direct again", 0.0), ("tunnel", 0.6), ("mesh", 0.2), ("gateway", 0.0)):
        one = found[route]
        assert one.rounds == 40
        assert one.added_ms == pytest.approx(truth, abs=0.04)
        assert one.low_ms is not None
        assert one.high_ms is not None
        assert one.low_ms <= truth <= one.high_ms
    assert [one.is_clear for one in found.values()] == [None, True, True, False]


def test_a_round_with_a_failed_request_is_left_out() -> None:
    run = measured(("direct", "direct again", "mesh"), 8)
    broken = (failed_record(0, route="direct"), *run.records[1:])
    found = by_route(replace(run, records=broken))
    assert [one.rounds for one in found.values()] == [7, 7]
    few = by_route(measured(("direct", "direct again", "mesh"), 5))
    assert few["mesh"].low_ms is None
    assert few["mesh"].is_clear is None


def test_a_stage_without_routes_has_none() -> None:
    assert route_differences(make_stage_run(record())) == ()
