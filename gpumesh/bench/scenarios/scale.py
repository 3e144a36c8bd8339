"""The scenario ``scale``: the mesh against the sum of its nodes, each at its capacity."""

from __future__ import annotations

import math
from functools import partial

from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.scenarios.base import (
    ScenarioContext,
    ScenarioSteps,
    find_limit,
    make_mesh_stage,
    make_node_stage,
    whole_rounds,
)
from gpumesh.bench.scenarios.capacity import find_capacities
from gpumesh.bench.scenarios.settled import measure_settled
from gpumesh.bench.scenarios.warm_up import warm_up_at

REQUESTS = 10
ROUNDS = 5
# The mesh's stage lasts as long as the longest stage of a node, so that a slow node answers as often as alone. But a
# much faster node needs many requests for that.
MAX_MESH_ROUNDS = 25


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
    alone: list[StageResult] = []
    planned_count = 0
    for node in context.nodes:
        level = levels[node.name]
        count = whole_rounds(max(settings.requests or REQUESTS, ROUNDS * level), level)
        planned_count += count
        outcome = yield from measure_settled(
            context, partial(make_node_stage, context.prompts, node.name, count, level)
        )
        alone.extend(outcome.results)
        limit = find_limit(outcome.after, node.name)
        if limit is not None and limit < level:
            context.notes.append(
                f"stage {node.name}: the mesh gave it {limit} at a time, not {level}: its rate is below its capacity"
            )
    total_level = sum(levels.values())
    count = _mesh_count(alone, planned_count, total_level)
    yield from measure_settled(context, partial(make_mesh_stage, "mesh", context.prompts, count, total_level))


def _mesh_count(alone: list[StageResult], planned_count: int, level: int) -> int:
    """How many requests keep the mesh busy for as long as the longest stage of a node took, in whole rounds."""
    longest_s = max((stage.duration_s for stage in alone), default=0.0)
    per_s = math.fsum(stage.rates.loaded_requests_per_s or stage.rates.requests_per_s or 0.0 for stage in alone)
    wanted_count = min(math.ceil(longest_s * per_s), MAX_MESH_ROUNDS * level)
    return whole_rounds(max(planned_count, wanted_count), level)
