"""The scenario ``failover``: a node goes away under a steady load."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_mesh_stage
from gpumesh.errors import UsageError


def measure_failover(context: ScenarioContext) -> ScenarioSteps:
    """A steady load. In the middle of the stage one node is taken out of service and put back.

    Raises UsageError for fewer than two nodes.
    """
    settings, nodes = context.settings, context.nodes
    if len(nodes) < 2:
        raise UsageError("failover needs two nodes that can serve the model", hint="`gpumesh status` shows them")
    # Two requests per node: so each node has work at every moment, also between two requests.
    level = settings.concurrency[0] if settings.concurrency else 2 * len(nodes)
    count = settings.requests or 10 * level  # ten rounds: enough before, during and after the disturbance
    yield make_mesh_stage("failover", context.prompts, count, level, disturb=True)
