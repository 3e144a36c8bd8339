"""The scenario ``scale``: the mesh against the sum of its nodes, each at its capacity."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial

from gpumesh.bench.figures.scaling import scaling
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.scenarios.base import (
    ScenarioContext,
    ScenarioSteps,
    StageOutcome,
    find_limit,
    make_mesh_stage,
    make_node_stage,
    whole_rounds,
)
from gpumesh.bench.scenarios.capacity import find_capacities
from gpumesh.bench.scenarios.settled import MAX_TRIES, measure_settled
from gpumesh.bench.scenarios.warm_up import warm_up_at
from gpumesh.bench.workload.stages import Stage

REQUESTS = 10
ROUNDS = 5
# The mesh's stage lasts as long as the longest stage of a node, so that a slow node answers as often as alone. But a
# much faster node needs many requests for that.
MAX_MESH_ROUNDS = 25
# An efficiency that differs more from 100 % must show twice: all is measured a second time, and the second time counts.
MAX_SURPRISE = 0.03


def measure_scale(context: ScenarioContext) -> ScenarioSteps:
    """Each node alone at its capacity, then the mesh at the sum of the capacities. Efficiency is mesh ÷ sum of nodes.

    The capacities are found first. With ``settings.concurrency``, its first level is used for each node instead.
    """
    settings = context.settings
    if settings.concurrency:
        levels = {node.name: settings.concurrency[0] for node in context.nodes}
        for name, level in levels.items():
            yield from warm_up_at(context, level, name)
    else:
        yield from find_capacities(context)
        levels = {capacity.node: capacity.parallel for capacity in context.capacities}
    plans = [_plan(context, node.name, levels[node.name]) for node in context.nodes]
    results = yield from _measure_all(context, plans, first_attempt=1)
    found = scaling(results)
    if found is not None and abs(found.efficiency - 1.0) > MAX_SURPRISE:
        context.notes.append(f"the efficiency was {found.efficiency:.0%}: nodes and mesh were measured again")
        yield from _measure_all(context, plans, first_attempt=2 * MAX_TRIES + 1)


def _measure_all(
    context: ScenarioContext, plans: Sequence[_NodePlan], *, first_attempt: int
) -> Generator[Stage, StageOutcome, list[StageResult]]:
    """Measures each node alone and then the mesh. Returns the results. ``first_attempt``: see ``measure_settled``."""
    alone: dict[str, StageOutcome] = {}
    for plan in plans:
        alone[plan.node] = yield from measure_settled(context, plan.make, first_attempt=first_attempt)
    level = sum(plan.level for plan in plans)
    count = _mesh_count(alone.values(), sum(plan.count for plan in plans), level)
    make_mesh = partial(make_mesh_stage, "mesh", context.prompts, count, level)
    mesh = yield from measure_settled(context, make_mesh, first_attempt=first_attempt)
    for plan in plans:
        limit, mesh_limit = (find_limit(outcome.after, plan.node) for outcome in (alone[plan.node], mesh))
        if limit != mesh_limit:  # otherwise a node with more slots in the mesh than alone would look like a gain
            context.notes.append(
                f"{plan.node} was measured alone when its limit was {limit}, and it is {mesh_limit} in the mesh:"
                " it was measured alone again"
            )
            alone[plan.node] = yield from measure_settled(context, plan.make, first_attempt=first_attempt + MAX_TRIES)
        if mesh_limit is not None and mesh_limit < plan.level:
            context.notes.append(
                f"the mesh gives {plan.node} {mesh_limit} at a time, not {plan.level}: its rates are below its capacity"
            )
    return [result for outcome in (*alone.values(), mesh) for result in outcome.results]


@dataclass(frozen=True, slots=True)
class _NodePlan:
    """How a node is measured alone: ``count`` requests with ``level`` in flight. ``make`` makes the stage."""

    node: str
    level: int
    count: int
    make: Callable[[], Stage]


def _plan(context: ScenarioContext, node: str, level: int) -> _NodePlan:
    """The plan for a node that is measured with ``level`` requests in flight."""
    count = whole_rounds(max(context.settings.requests or REQUESTS, ROUNDS * level), level)
    return _NodePlan(node, level, count, partial(make_node_stage, context.prompts, node, count, level))


def _mesh_count(alone: Collection[StageOutcome], planned_count: int, level: int) -> int:
    """How many requests keep the mesh busy for as long as the longest stage of a node took, in whole rounds."""
    longest_s = max(outcome.duration_s for outcome in alone)
    rates = [result.rates.best_requests_per_s or 0.0 for outcome in alone for result in outcome.results]
    wanted_count = min(math.ceil(longest_s * math.fsum(rates)), MAX_MESH_ROUNDS * level)
    return whole_rounds(max(planned_count, wanted_count), level)
