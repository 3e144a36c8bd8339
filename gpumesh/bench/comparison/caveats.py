"""What may explain a difference between two results, though both may be compared. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.bench.comparison.estimates import ASSUMED_DRIFT
from gpumesh.bench.results.result import BenchResult
from gpumesh.text.printable import printable


def find_caveats(a: BenchResult, b: BenchResult) -> Iterator[str]:
    """Yields sentences about differences between the runs that may explain differences between the figures."""
    if len(a.runs) < 2 and len(b.runs) < 2:
        yield (
            "both are single runs: how much a run differs from the next is not known, and taken for "
            f"{ASSUMED_DRIFT * 100:g} % (`bench run --repeat 6` measures it)"
        )
    environment_a, environment_b = a.environment, b.environment
    if environment_a.gpumesh != environment_b.gpumesh:
        yield f"measured by gpumesh {environment_a.gpumesh} and {environment_b.gpumesh}"
    if environment_a.platform != environment_b.platform or environment_a.cpus != environment_b.cpus:
        yield f"measured from different machines: {environment_a.platform} and {environment_b.platform}"
    if environment_a.embedded != environment_b.embedded:
        where = [
            "in the measuring process" if environment.embedded else "already running"
            for environment in (environment_a, environment_b)
        ]
        yield f"the mesh was {where[0]} in A and {where[1]} in B"
    requests_a, requests_b = _requests_per_run(a), _requests_per_run(b)
    if requests_a != requests_b:
        yield f"not the same number of requests in a run: {requests_a} and {requests_b}"
    for label, result in (("A", a), ("B", b)):
        if result.partial:
            reason = "" if result.partial_reason is None else f" ({printable(result.partial_reason)})"
            yield f"{label} is partial: its run did not come to its end{reason}"
        for run in result.runs or (result,):
            if any(stage.client.bound for stage in run.stages):
                yield f"{label} was bound by the client in some stage (see its notes)"
                break


def _requests_per_run(result: BenchResult) -> int:
    """The number of requests of a run, in all its stages."""
    first_run = result.runs[0] if result.runs else result
    return sum(stage.requests for stage in first_run.stages)
