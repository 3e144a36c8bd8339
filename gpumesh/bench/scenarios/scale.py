"""The scenario ``scale``: the mesh against the sum of its nodes."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_mesh_stage, make_node_stage

REQUESTS = 10
MIN_ROUNDS = 3


def measure_scale(context: ScenarioContext) -> ScenarioSteps:
    """Each node alone at its full load, then the mesh at the sum of the loads. Efficiency is mesh ÷ sum of nodes."""
    settings = context.settings
    total_level = total_count = 0
    for node in context.nodes:
        # By default the full load: as many requests as the node runs at once; 1 if that is unknown.
        level = settings.concurrency[0] if settings.concurrency else node.parallel or 1
        count = max(settings.requests or REQUESTS, MIN_ROUNDS * level)
        total_level += level
        total_count += count
        yield make_node_stage(context.prompts, node.name, count, level)
    yield make_mesh_stage("mesh", context.prompts, total_count, total_level)
