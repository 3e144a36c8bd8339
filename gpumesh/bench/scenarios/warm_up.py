"""The warm-up: full answers before anything is measured."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_stage
from gpumesh.bench.workload.stages import PlannedRequest, StageKind


def warm_up(context: ScenarioContext) -> ScenarioSteps:
    """A full answer from each node, from all at the same time, so that the model is loaded before anything is
    measured."""
    requests = [PlannedRequest(context.prompts.make_prompt(), node.name) for node in context.nodes]
    yield make_stage("warm-up", StageKind.WARM_UP, requests, concurrency=len(requests))


def warm_up_at(context: ScenarioContext, level: int, node: str | None = None) -> ScenarioSteps:
    """``level`` full answers at once from the mesh, or from one node, so that its slots are known and all were used.

    Without effect if the first warm-up has sent as many there.
    """
    if level > (len(context.nodes) if node is None else 1):
        requests = [PlannedRequest(context.prompts.make_prompt(), node) for _ in range(level)]
        yield make_stage(f"warm-up at {level}", StageKind.WARM_UP, requests, concurrency=level, node=node)
