"""The scenario ``quick``: each node alone, then all together."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_mesh_stage, make_node_stage

REQUESTS = 10  # enough for a p90 (``stats.supports_percentile``)


def measure_quick(context: ScenarioContext) -> ScenarioSteps:
    """Each node alone with one request at a time, then all nodes together, by default with one request per node."""
    settings, nodes = context.settings, context.nodes
    count = settings.requests or REQUESTS
    level = settings.concurrency[0] if settings.concurrency else len(nodes)
    for node in nodes:
        yield make_node_stage(context.prompts, node.name, count, concurrency=1)
    yield make_mesh_stage("mesh", context.prompts, count * len(nodes), level)
