"""Runs a whole benchmark: the stages of a scenario on a mesh, and the result of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import TypeAlias

from gpumesh.bench.failover.outage_disturbance import OutageDisturbance
from gpumesh.bench.failover.outage_plan import OutagePlan
from gpumesh.bench.figures.cost import NO_PRICES, Prices, stage_costs
from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.notes.coverage_notes import coverage_notes
from gpumesh.bench.figures.notes.rate_notes import rate_notes
from gpumesh.bench.figures.routes.route_costs import route_costs
from gpumesh.bench.figures.scaling import scaling
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.load.conditions import Via
from gpumesh.bench.load.load_sources import LoadSource
from gpumesh.bench.load.route_arms import RouteAccess
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.measured_nodes import exclusion_notes, no_usable_node, node_notes, select_nodes, usable_nodes
from gpumesh.bench.results.result import BenchResult, describe_environment
from gpumesh.bench.scenarios.base import ScenarioContext
from gpumesh.bench.scenarios.catalog import scenario_steps
from gpumesh.bench.stage_runner import BenchTarget, ProgressReporter, StageRunner
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.prompts import OwnPrompt, PromptFactory
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.traces import TracedRequest


@dataclass(frozen=True, slots=True)
class BenchOutput:
    """What a run yields: its result, and the outcome of each request, those of the warm-up too."""

    result: BenchResult
    records: tuple[LoadSample, ...]


KeepResult: TypeAlias = Callable[[BenchResult, Sequence[LoadSample]], None]
"""Called with what a run has yielded until now: its result, ``partial`` until the run ends, and all its requests."""


async def run_benchmark(
    target: BenchTarget,
    scenario: Scenario,
    settings: BenchSettings,
    *,
    progress: ProgressReporter,
    rng: Random,
    objective: Objective | None = None,
    trace: Sequence[TracedRequest] = (),
    own_prompts: Sequence[OwnPrompt] = (),
    outage: OutagePlan | None = None,
    only_node: str | None = None,
    access: RouteAccess | None = None,
    load: LoadSource | None = None,
    prices: Prices = NO_PRICES,
    keep: KeepResult = lambda _result, _records: None,
    notes: Sequence[str] = (),
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> BenchOutput:
    """Runs a scenario and computes its result.

    - ``rng`` makes the nonces of the prompts.
    - ``objective``: the TTFT and TPOT that a request must meet to count for goodput; ``None``: the default.
    - ``trace``: the requests that scenario ``replay`` sends. ``own_prompts``: the prompts for scenario ``load``.
    - ``outage``, for scenario ``failover``: which node is taken out of service, and how.
    - ``only_node``: only this node is measured, as if it were the whole mesh.
    - ``access``, for scenario ``overhead``: how the routes that start outside the mesh are reached.
    - ``load`` sends the requests; ``None``: this process sends them, through ``target``.
    - ``prices``: what energy and nodes cost, from which the cost of the tokens is computed.
    - ``keep`` is called with the result until now: before the first stage, after each stage, when an error or a signal
      ends the run, and at the end. So nothing that was measured is lost.
    - ``notes`` become the first notes of the result.

    Warm-up requests are recorded, but no figure includes them. Raises NoNodeError when no node can serve the model,
    UsageError when the scenario cannot be run here, and MeshNotRunning when the mesh ends during the run.
    """
    objective = objective or Objective()
    started_at = now()
    state = await target.status()
    nodes = select_nodes(usable_nodes(state, settings.model), only_node)
    if not nodes:
        raise no_usable_node(state, settings.model, only_node)
    all_notes = [*notes, *node_notes(nodes, state.findings)]
    if only_node is None:  # with ``only_node``, the others are not measured because the person wants so: no note
        all_notes.extend(exclusion_notes(state, nodes))
    names = [node.name for node in nodes]
    disturbance: OutageDisturbance | None = None
    if scenario is Scenario.FAILOVER:
        disturbance = OutageDisturbance(target, outage or OutagePlan(), names, state)
        all_notes.extend(disturbance.notes)
    run = StageRunner(
        target, names, objective, progress, disturbance, access or RouteAccess(), only_node, load, model=settings.model
    )
    context = ScenarioContext(
        settings,
        run.node_facts(state),
        PromptFactory(settings, rng),
        trace=trace,
        own_prompts=own_prompts,
        notes=all_notes,
        has_mesh=load is None or load.via in (Via.GATEWAY, Via.MESH),
    )
    is_url = run.via is Via.URL

    def make_result(*, partial: bool) -> BenchResult:
        """The result of the stages until now."""
        stages = run.results
        notes_of_stages = [note for stage in stages for note in coverage_notes(stage)]
        notes = [*all_notes, *run.notes, *load_notes(stages), *rate_notes(stages), *notes_of_stages]
        whole_stages = [stage for stage in stages if not stage.partial]
        return BenchResult(
            at=started_at,
            scenario=scenario,
            settings=settings,
            objective=objective,
            environment=describe_environment(
                run.last_state or state,
                embedded=target.embedded,
                via=run.via,
                url=nodes[0].backend.url if is_url else None,
                measured=names,
                prices=prices,
            ),
            stages=tuple(stages),
            # Only these two scenarios measure each node alone and then the mesh.
            scaling=scaling(whole_stages) if scenario in (Scenario.SCALE, Scenario.QUICK) else None,
            routes=route_costs(stages),
            route_differences=tuple(run.route_differences),
            failover=run.failover,
            notes=tuple(dict.fromkeys(notes)),  # each note once
            capacity=tuple(context.capacities),
            cold_starts=tuple(run.cold_starts),
            knee=find_knee(whole_stages, objective) if scenario is Scenario.SWEEP else None,
            partial=partial,
            costs=stage_costs(stages, prices, names),
        )

    steps = scenario_steps(scenario, context)
    stage = next(steps, None)
    keep(make_result(partial=True), ())
    try:
        while stage is not None:
            outcome = await run.measure(stage)
            keep(make_result(partial=True), run.records)
            try:
                stage = steps.send(outcome)
            except StopIteration:
                break
    except BaseException:  # Ctrl-C, the mesh has ended, the scenario cannot go on
        keep(make_result(partial=True), run.records)
        raise
    result = make_result(partial=False)
    keep(result, run.records)
    return BenchOutput(result, tuple(run.records))


def load_notes(stages: Sequence[StageResult]) -> list[str]:
    """A note for each stage whose figures may not be those of the servers."""
    notes = []
    for stage in stages:
        limit = None if stage.conditions is None else stage.conditions.limit
        if stage.client.bound is not None:
            label = "" if limit is None else f"{limit.value.upper()}: "
            notes.append(f"stage {stage.name}: {label}{stage.client.bound}")
    return notes
