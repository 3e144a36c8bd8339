"""The scenario ``quick``: each node alone, then all together."""

from __future__ import annotations

from functools import partial

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_mesh_stage, make_node_stage
from gpumesh.bench.scenarios.settled import measure_settled
from gpumesh.bench.scenarios.warm_up import warm_up_at

REQUESTS = 10  # enough for a p90 (``stats.supports_percentile``)


def measure_quick(context: ScenarioContext) -> ScenarioSteps:
    """Each node alone with one request at a time, then all nodes together, by default with one request per node."""
    settings, nodes = context.settings, context.nodes
    count = settings.requests or REQUESTS
    level = settings.concurrency[0] if settings.concurrency else len(nodes)
    yield from warm_up_at(context, level)
    for node in nodes:
        yield from measure_settled(context, partial(make_node_stage, context.prompts, node.name, count, 1))
    if len(nodes) == 1 and not context.has_mesh:
        return  # a single server is not a mesh: it has been measured alone
    yield from measure_settled(context, partial(make_mesh_stage, "mesh", context.prompts, count * len(nodes), level))
