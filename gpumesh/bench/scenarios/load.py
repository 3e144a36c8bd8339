"""The scenario ``load``: a load of the user's own shape on the mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from gpumesh.backends.base import ChatRequest
from gpumesh.bench.scenarios.base import ScenarioContext, ScenarioSteps, make_stage
from gpumesh.bench.workload.arrivals import arrival_times_s
from gpumesh.bench.workload.settings import BenchSettings
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind

DEFAULT_REQUESTS = 100
MAX_REQUESTS = 1_000_000  # more would take much memory before the first is sent
SPARE = 1.5  # a closed loop with a duration gets so many times the requests that the trial stage lets expect


def measure_load(context: ScenarioContext) -> ScenarioSteps:
    """One stage: an open loop at ``settings.rate``, or a closed loop with the first level of concurrency.

    It ends after ``settings.duration_s`` or ``settings.requests``, whichever comes first; without both, after
    ``DEFAULT_REQUESTS``.
    """
    settings = context.settings
    if settings.rate is not None:
        yield _open_loop(context, settings.rate)
        return
    level = settings.concurrency[0] if settings.concurrency else len(context.nodes)
    conversations = _conversations(context)
    count = settings.requests or DEFAULT_REQUESTS
    if settings.duration_s is not None and settings.requests is None:
        # How many requests the time has room for shows a short trial, in which every slot is used once.
        trial = yield make_stage("trial", StageKind.WARM_UP, _take(conversations, level), level)
        rounds = settings.duration_s / max(trial.duration_s, 0.001)
        count = min(math.ceil(SPARE * rounds + 1) * level, MAX_REQUESTS)
    outcome = yield _stage(settings, _take(conversations, count), level)
    if settings.duration_s is not None and settings.requests is None and outcome.duration_s < settings.duration_s:
        context.notes.append(
            f"all {count:,} requests that were prepared had been sent after {outcome.duration_s:.0f} s: "
            "give their number with -n"
        )


def _open_loop(context: ScenarioContext, rate: float) -> Stage:
    """An open loop with ``rate`` requests per second, or conversations that begin so often."""
    settings = context.settings
    # The moments come from the seed, so that two runs have the same load.
    times_s = arrival_times_s(settings.arrivals, rate, burst=settings.burst, rng=Random(settings.seed))
    if settings.duration_s is not None:
        duration_s = settings.duration_s
        times_s = itertools.takewhile(lambda at_s: at_s < duration_s, times_s)
    count = settings.requests or (DEFAULT_REQUESTS if settings.duration_s is None else MAX_REQUESTS)
    conversations = _conversations(context)
    requests: list[PlannedRequest] = []
    for at_s in times_s:
        if len(requests) >= count:
            break
        first, *later = next(conversations)
        requests += [replace(first, at_s=at_s), *later]
    return _stage(settings, requests[:count], None)


def _stage(settings: BenchSettings, requests: Sequence[PlannedRequest], level: int | None) -> Stage:
    """The stage that is measured: an open loop if ``level`` is ``None``."""
    kind = StageKind.TRACE if level is None else StageKind.MESH
    return make_stage("load", kind, requests, level, duration_s=settings.duration_s, think_s=settings.think_s)


def _take(conversations: Iterator[list[PlannedRequest]], count: int) -> list[PlannedRequest]:
    """The first ``count`` requests of these conversations; the last conversation may be cut short."""
    return list(itertools.islice(itertools.chain.from_iterable(conversations), count))


def _conversations(context: ScenarioContext) -> Iterator[list[PlannedRequest]]:
    """Yields conversations without end, each with all its turns. A prompt without further turns is one of one turn."""
    settings = context.settings
    system = context.prompts.make_system_message()
    prompts = _prompts(context)
    for number in itertools.count():
        first = next(prompts)
        chats = [replace(first, messages=(*system, *first.messages))]
        chats += [next(prompts) for _ in range(settings.turns - 1)]
        conversation = number if settings.turns > 1 else None
        yield [PlannedRequest(chat, conversation=conversation) for chat in chats]


def _prompts(context: ScenarioContext) -> Iterator[ChatRequest]:
    """Yields prompts without end: those of the user's file again and again, or else prompts that are made up."""
    if context.own_prompts:
        for own in itertools.cycle(context.own_prompts):
            yield context.prompts.make_own_prompt(own)
    while True:
        yield context.prompts.make_prompt()
