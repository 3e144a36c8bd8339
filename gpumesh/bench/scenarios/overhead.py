"""The scenario ``overhead``: what tunnel, mesh and gateway add to a request."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_stage
from gpumesh.bench.workload.stages import PlannedRequest, StageKind

REQUESTS = 50  # for each route


def measure_overhead(context: ScenarioContext) -> ScenarioSteps:
    """A stage for each node: answers of one token, one at a time, so that the overhead of the routes dominates.

    The routes take turns. ``settings.requests`` is the number for each route.
    """
    count = (context.settings.requests or REQUESTS) * context.routes
    for node in context.nodes:
        requests = [
            PlannedRequest(context.prompts.make_prompt(tokens=1, prompt_tokens=1), node.name) for _ in range(count)
        ]
        yield make_stage(node.name, StageKind.NODE, requests, concurrency=1, node=node.name, over_routes=True)
