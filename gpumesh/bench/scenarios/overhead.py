"""The scenario ``overhead``: what tunnel, mesh and gateway add to a request."""

from __future__ import annotations

from random import Random

from gpumesh.bench.scenarios.balanced_order import balanced_rounds
from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_stage
from gpumesh.bench.workload.stages import PlannedRequest, StageKind

ROUNDS = 50


def measure_overhead(context: ScenarioContext) -> ScenarioSteps:
    """A stage for each node: answers of one token, one at a time, so that the overhead of the routes dominates.

    In each round one request takes each route, in a random order that is balanced over the rounds; the shortest route
    is taken twice. ``settings.requests`` is the number of rounds.
    """
    rounds, rng = context.settings.requests or ROUNDS, Random(context.settings.seed)
    for node in context.nodes:
        requests = [
            PlannedRequest(context.prompts.make_prompt(tokens=1, prompt_tokens=1), node.name, route=route)
            for routes in balanced_rounds(node.routes, rounds, rng)
            for route in routes
        ]
        yield make_stage(node.name, StageKind.NODE, requests, concurrency=1, node=node.name, over_routes=True)
