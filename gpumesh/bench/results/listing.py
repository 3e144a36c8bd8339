"""What a list of results tells of each: when, which scenario and model, on which nodes, and its main rate. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind


@dataclass(frozen=True, slots=True)
class ListedResult:
    """A result in a list. ``name`` is its folder's name, ``runs`` its number of runs.

    ``tokens_per_s`` is its ``main_rate``.
    """

    name: str
    at: datetime
    scenario: Scenario
    model: str
    nodes: tuple[str, ...]
    runs: int
    tokens_per_s: float | None
    partial: bool
    simulated: bool


def list_result(name: str, result: BenchResult) -> ListedResult:
    """The result as it is listed. ``name`` is its folder's name."""
    return ListedResult(
        name=name,
        at=result.at,
        scenario=result.scenario,
        model=result.settings.model,
        nodes=tuple(node.name for node in result.environment.nodes),
        runs=max(len(result.runs), 1),
        tokens_per_s=main_rate(result),
        partial=result.partial,
        simulated=result.simulated,
    )


def main_rate(result: BenchResult) -> float | None:
    """The highest output rate of the stages of the mesh, in tokens/s. Without such a stage, that of all stages.

    ``None`` if no rate is known, and for ``overhead``, whose answers have one token.
    """
    if result.scenario is Scenario.OVERHEAD:
        return None
    whole_mesh = [stage for stage in result.stages if stage.kind is not StageKind.NODE]
    return max(map(_rate, whole_mesh or result.stages), default=0.0) or None


def _rate(stage: StageResult) -> float:
    return stage.rates.best_tokens_per_s or 0.0
