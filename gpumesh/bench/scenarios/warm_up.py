"""The warm-up: the stage with which every scenario begins."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_stage
from gpumesh.bench.workload.stages import PlannedRequest, StageKind


def warm_up(context: ScenarioContext) -> ScenarioSteps:
    """A short request to each node, so that the model is loaded before anything is measured."""
    requests = [PlannedRequest(context.prompts.make_prompt(tokens=1), node.name) for node in context.nodes]
    yield make_stage("warm-up", StageKind.WARM_UP, requests, concurrency=1)
