"""The scenario ``sweep``: rising concurrency shows where throughput stops growing, and the latency at that point."""

from __future__ import annotations

from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_mesh_stage

DEFAULT_LEVELS = (1, 2, 4, 8)
# At least ten requests, which are enough for a p90, and three rounds: in the first round and in the last, not all slots
# are taken all the time.
MIN_REQUESTS, MIN_ROUNDS = 10, 3


def measure_sweep(context: ScenarioContext) -> ScenarioSteps:
    """The mesh at each level of concurrency, one stage for each."""
    settings = context.settings
    for level in settings.concurrency or DEFAULT_LEVELS:
        count = max(settings.requests or 0, MIN_REQUESTS, MIN_ROUNDS * level)
        yield make_mesh_stage(f"c={level}", context.prompts, count, level)
