"""Computes what each part of a route adds to a request, from requests that took the routes in turn. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpumesh.bench.figures.answers.answer import read_answers
from gpumesh.bench.figures.latency import outside_server_ms
from gpumesh.bench.load.samples import SampleOutcome, StageRun
from gpumesh.bench.paired_differences import PairedDifference, paired_difference
from gpumesh.bench.workload.route_names import DIRECT, GATEWAY, MESH, TUNNEL, is_control, measured_route


@dataclass(frozen=True, slots=True)
class RouteDifference:
    """What ``route`` adds to the latency of ``base``, a shorter route to the same node, in ms.

    It is the difference of the requests of each round: of their times outside the server if the server tells its own
    time, else of their times from end to end. ``low_ms`` and ``high_ms`` are the ends of the 95 % interval, which
    fewer than 6 rounds do not have. If ``route`` is ``base`` measured again, this is the A-A difference.

    ``is_clear``: the interval has no value in common with that of the A-A difference; without that the difference
    counts as none. ``None`` if an interval is unknown, and for the A-A difference itself.
    """

    node: str
    route: str
    base: str
    rounds: int
    added_ms: float
    low_ms: float | None = None
    high_ms: float | None = None
    is_clear: bool | None = None

    @property
    def is_noise(self) -> bool:
        """Whether the difference is known to be no clear one; ``False`` also if ``is_clear`` is ``None``."""
        return self.is_clear is False


def route_differences(run: StageRun) -> tuple[RouteDifference, ...]:
    """The differences between the routes of a stage, the A-A difference first. Empty for a stage without routes."""
    routes = {planned.route for planned in run.stage.requests if planned.route is not None}
    if run.stage.node is None or not routes:
        return ()
    records = [answer.record for answer in read_answers(run.records)]
    served = [record for record in records if record.outcome is SampleOutcome.SERVED]
    server_tells = all(outside_server_ms(record) is not None for record in served)
    times_ms: dict[str, dict[int, float]] = {route: {} for route in routes}  # by the number of the round
    for record in served:
        latency_ms = outside_server_ms(record) if server_tells else record.end_to_end_ms
        if record.route is not None and latency_ms is not None:
            times_ms[record.route][record.index // len(routes)] = latency_ms  # a round has a request for each route
    differences: list[RouteDifference] = []
    control: PairedDifference | None = None
    for route, base in _compared_routes(routes):
        pairs = [
            latency_ms - times_ms[base][number]
            for number, latency_ms in sorted(times_ms[route].items())
            if number in times_ms[base]
        ]
        difference = paired_difference(pairs)
        if difference is None:
            continue
        is_clear = None
        if is_control(route):
            control = difference
        elif control is not None:
            overlap = difference.overlaps(control)
            is_clear = None if overlap is None else not overlap
        added = RouteDifference(
            run.stage.node,
            route,
            base,
            rounds=difference.pairs,
            added_ms=difference.estimate,
            low_ms=difference.low,
            high_ms=difference.high,
            is_clear=is_clear,
        )
        differences.append(added)
    return tuple(differences)


def _compared_routes(routes: set[str]) -> Iterator[tuple[str, str]]:
    """Yields pairs of routes that are compared: a route, and the shorter route that it contains. The first pair is the
    control and the route that it measures again."""
    for route in routes:
        if is_control(route):
            yield route, measured_route(route)
    if {TUNNEL, DIRECT} <= routes:
        yield TUNNEL, DIRECT
    server_route = TUNNEL if TUNNEL in routes else DIRECT
    for route in (MESH, GATEWAY):
        if route in routes and server_route in routes:
            yield route, server_route
