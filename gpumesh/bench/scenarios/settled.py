"""Measures a stage again if the mesh was not settled: a limit or what a node has in memory changed while it ran."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

from gpumesh.bench.figures.loaded_part import LOAD_NOISE_MS
from gpumesh.bench.scenarios.base import NodeFacts, ScenarioContext, StageOutcome
from gpumesh.bench.workload.stages import Stage
from gpumesh.text.model_names import full_name

MAX_TRIES = 3  # of one stage


def measure_settled(
    context: ScenarioContext, make: Callable[[], Stage], *, first_attempt: int = 1
) -> Generator[Stage, StageOutcome, StageOutcome]:
    """Measures a stage until nothing changes while it runs, at most ``MAX_TRIES`` times, and returns the last outcome.

    ``make`` makes the stage, for each attempt with new prompts, because no server may have them in its cache. The last
    attempt counts, and the reason for each repetition becomes a note. ``first_attempt`` is more than 1 if the stage was
    measured before.
    """
    last_attempt = first_attempt + MAX_TRIES - 1
    for attempt in range(first_attempt, last_attempt + 1):
        stage = replace(make(), attempt=attempt)
        outcome = yield stage
        changes = list(find_changes(stage, outcome))
        if not changes:
            break
        changes_text = f"while stage {stage.name} ran, {'; '.join(changes)}"
        is_last = attempt == last_attempt
        context.notes.append(
            f"{changes_text}: its figures are not those of a settled mesh"
            if is_last
            else f"{changes_text}: it was measured again"
        )
    return outcome


def find_changes(stage: Stage, outcome: StageOutcome) -> Iterator[str]:
    """Yields what changed on the nodes of this stage while it ran, in words."""
    model = full_name(stage.requests[0].chat.model)
    for result in outcome.results:
        load_ms = result.latency.server_load.max
        if load_ms is not None and load_ms > LOAD_NOISE_MS:
            yield f"a request waited {load_ms / 1000.0:.1f} s for a load of the model"
    after = {facts.name: facts for facts in outcome.after}
    for before in outcome.before:
        if before.name in after and stage.node in (None, before.name):
            yield from _changes_of_node(before, after[before.name], model)


def _changes_of_node(before: NodeFacts, after: NodeFacts, model: str) -> Iterator[str]:
    """Yields what changed on one node. An unknown limit counts as 1: that is the mesh's first guess.

    The measured model may be in memory long before a probe reports it. So its first report is no change.
    """
    if (before.parallel or 1) != (after.parallel or 1):
        yield f"the limit of {before.name} changed from {before.parallel or 1} to {after.parallel or 1}"
    loaded_before = {full_name(name) for name in before.loaded}
    loaded_after = {full_name(name) for name in after.loaded}
    for name in sorted(loaded_after - loaded_before - {model}):
        yield f"{before.name} loaded {name}"
    for name in sorted(loaded_before - loaded_after):
        yield f"{before.name} unloaded {name}"
