"""The scenario ``replay``: the requests of a public trace, at the trace's own times."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_stage
from gpumesh.bench.workload.stages import PlannedRequest, StageKind
from gpumesh.errors import UsageError


def measure_replay(context: ScenarioContext) -> ScenarioSteps:
    """Replays a trace: sends requests at the trace's own times (÷ speed), whether or not the mesh keeps up.

    Raises UsageError without a trace.
    """
    settings, trace = context.settings, context.trace
    if not trace:
        raise UsageError("replay needs a trace", hint="--trace FILE: Azure's CSV or Mooncake's JSONL")
    traced_requests = trace[: settings.requests] if settings.requests else trace
    start_s = traced_requests[0].at_s  # the first request is sent at the start of the stage
    requests = [
        PlannedRequest(context.prompts.make_traced_prompt(traced), at_s=(traced.at_s - start_s) / settings.speed)
        for traced in traced_requests
    ]
    cut_count = sum(traced.prompt_tokens > settings.max_context for traced in traced_requests)
    if cut_count:
        context.notes.append(
            f"{cut_count:,} of the trace's {len(traced_requests):,} prompts were cut to {settings.max_context:,}"
            " tokens: their TTFT is that of a shorter prompt"
        )
    yield make_stage("replay", StageKind.TRACE, requests, concurrency=None)
