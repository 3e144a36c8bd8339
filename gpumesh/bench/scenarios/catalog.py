"""The steps of each scenario, with the warm-up before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps
from gpumesh.bench.scenarios.failover import measure_failover
from gpumesh.bench.scenarios.load import measure_load
from gpumesh.bench.scenarios.overhead import measure_overhead
from gpumesh.bench.scenarios.quick import measure_quick
from gpumesh.bench.scenarios.replay import measure_replay
from gpumesh.bench.scenarios.scale import measure_scale
from gpumesh.bench.scenarios.sweep import measure_sweep
from gpumesh.bench.scenarios.warm_up import warm_up, warm_up_at
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind
from gpumesh.errors import UsageError

SCENARIOS: Mapping[Scenario, Callable[[ScenarioContext], ScenarioSteps]] = MappingProxyType(
    {
        Scenario.QUICK: measure_quick,
        Scenario.SWEEP: measure_sweep,
        Scenario.SCALE: measure_scale,
        Scenario.OVERHEAD: measure_overhead,
        Scenario.FAILOVER: measure_failover,
        Scenario.REPLAY: measure_replay,
        Scenario.LOAD: measure_load,
    }
)


def scenario_steps(scenario: Scenario, context: ScenarioContext) -> ScenarioSteps:
    """The stages of a scenario, one after another; the first stage is the warm-up.

    Raises UsageError, before the first stage, if the settings make no sense or the scenario cannot be run on these
    nodes.
    """
    context.settings.check()
    if not context.nodes:
        raise UsageError(
            f"no node that is up has the model {context.settings.model!r}", hint="`gpumesh status` shows why"
        )
    steps = SCENARIOS[scenario](context)
    first_stage = next(steps)  # before the warm-up, so that an error comes before anything is sent
    yield from warm_up(context)
    if first_stage.kind in (StageKind.NODE, StageKind.MESH):  # otherwise the scenario warms up itself
        yield from warm_up_at(context, first_stage.concurrency or 1, first_stage.node)
    stage = first_stage
    while True:
        outcome = yield stage
        try:
            stage = steps.send(outcome)
        except StopIteration:
            return
