"""The scenario ``sweep``: rising concurrency shows where throughput stops growing, and the latency at that point."""

from __future__ import annotations

from functools import partial

from gpumesh.bench.scenarios.base import (
    ScenarioContext,
    ScenarioSteps,
    StageOutcome,
    make_mesh_stage,
    whole_rounds,
)
from gpumesh.bench.scenarios.capacity import find_capacities
from gpumesh.bench.scenarios.settled import MAX_TRIES, measure_settled
from gpumesh.bench.scenarios.warm_up import warm_up_at

# At least ten requests, which are enough for a p90, and four rounds: the first round and the last do not count.
MIN_REQUESTS, MIN_ROUNDS = 10, 4
PAST_CAPACITY = (1.5, 2.0)  # the levels past the capacity, as multiples of it
# A rate that is so much lower than that of a lower level is measured a second time, and the second time counts: a
# moment of disturbance would look like a load that the mesh cannot bear.
MAX_DIP = 0.02


def measure_sweep(context: ScenarioContext) -> ScenarioSteps:
    """The mesh at each level of concurrency, one stage for each.

    The levels are those of the settings. Without them, the capacity of each node is found first, and the levels rise to
    the sum of the capacities and past it.
    """
    levels = context.settings.concurrency
    if levels:
        yield from warm_up_at(context, max(levels))
    else:
        yield from find_capacities(context)
        levels = sweep_levels(sum(capacity.parallel for capacity in context.capacities))
    highest = 0.0
    for level in levels:
        count = whole_rounds(max(context.settings.requests or 0, MIN_REQUESTS, MIN_ROUNDS * level), level)
        make = partial(make_mesh_stage, f"c={level}", context.prompts, count, level)
        outcome = yield from measure_settled(context, make)
        if _rate(outcome) < highest * (1.0 - MAX_DIP):
            context.notes.append(f"stage c={level} gave less than a lower level: it was measured again")
            outcome = yield from measure_settled(context, make, first_attempt=MAX_TRIES + 1)
        highest = max(highest, _rate(outcome))


def sweep_levels(capacity: int) -> tuple[int, ...]:
    """The levels of a sweep: the powers of 2 below the capacity, the capacity, and two levels past it."""
    below = [2**exponent for exponent in range(capacity.bit_length()) if 2**exponent < capacity]
    past = [round(capacity * factor) for factor in PAST_CAPACITY]
    return tuple(sorted({*below, capacity, *past}))


def _rate(outcome: StageOutcome) -> float:
    """The tokens/s of a stage; 0 if nothing was served."""
    return max((result.rates.best_tokens_per_s or 0.0 for result in outcome.results), default=0.0)
