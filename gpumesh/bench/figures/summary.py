"""Computes the result of a benchmark's stage from its records. Pure.

``answers`` decides what is known of the answers. The figures are in files of their own: ``latency``, ``rates``,
``node_shares``, ``phases``; ``scaling`` and ``route_costs`` compare stages.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpumesh.bench.figures.answers.answer import read_answers
from gpumesh.bench.figures.answers.coverage import Coverage, coverage_of, prompts_share_beginnings
from gpumesh.bench.figures.answers.token_counts import TokenCounts, sum_prompt_tokens
from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.figures.latency import Latency, latency_of
from gpumesh.bench.figures.loaded_part import find_loaded_part
from gpumesh.bench.figures.node_shares import NodeShare, node_shares
from gpumesh.bench.figures.outages.node_events import NodeEvent
from gpumesh.bench.figures.phases import Phase, phases_of
from gpumesh.bench.figures.rate_intervals import RateIntervals, rate_intervals
from gpumesh.bench.figures.rates import Rates, rates_of, with_loaded_rates
from gpumesh.bench.load.conditions import LoadConditions
from gpumesh.bench.load.samples import ClientLoad, LoadSample, SampleOutcome, StageRun
from gpumesh.bench.stats import Objective, ratio
from gpumesh.bench.workload.route_names import in_order
from gpumesh.bench.workload.stages import StageKind

MAX_FAILURES = 10  # the number of different reasons that are listed for a stage


@dataclass(frozen=True, slots=True)
class FailureCount:
    """Requests that failed for the same reason."""

    code: str
    message: str
    count: int


@dataclass(frozen=True, slots=True)
class StageResult:
    """The figures of a stage, or of one route of a stage.

    ``requests`` = ``served`` + ``failed`` + ``cut`` + ``unfinished``. ``partial``: the run was ended in this stage, so
    its figures are those of the time until then. ``planned`` is how many requests the whole stage would have had, over
    all its routes; ``None``: unknown. ``unfinished`` is how many of them were being answered at the end of a partial
    stage.

    ``retried`` is the number of requests that were served after more than one attempt. ``output_tokens`` and
    ``prompt_tokens`` are ``None`` if the count of one answer is unknown; ``coverage`` says for how many it is known
    (``None`` in a result of an older version). ``intervals`` are those of the rates.
    """

    name: str
    kind: StageKind
    node: str | None
    route: str | None
    concurrency: int | None
    duration_s: float
    requests: int
    served: int
    failed: int
    cut: int
    retried: int
    prompt_tokens: int | None
    output_tokens: int | None
    latency: Latency
    rates: Rates
    client: ClientLoad
    nodes: tuple[NodeShare, ...] = ()
    failures: tuple[FailureCount, ...] = ()
    gpu: GpuUse | None = None
    tokens_per_joule: float | None = None
    phases: tuple[Phase, ...] = ()
    disturbance: str | None = None
    coverage: Coverage | None = None
    node_events: tuple[NodeEvent, ...] = ()
    conditions: LoadConditions | None = None
    partial: bool = False
    planned: int | None = None
    unfinished: int = 0
    intervals: RateIntervals = field(default_factory=RateIntervals)


def stage_label(stage: StageResult) -> str:
    """The name of a stage, with its route if it has one. It is unique in a result."""
    return stage.name if stage.route is None else f"{stage.name} via {stage.route}"


def summarize_stage(run: StageRun, objective: Objective, gpu: GpuUse | None = None) -> list[StageResult]:
    """Computes the results of a stage: one result, or one result for each route if the stage used several.

    ``gpu`` is the use of the GPUs during the stage, ``None`` if unknown.
    """
    routes = in_order(record.route for record in run.records) or [None]
    results: list[StageResult] = []
    for route in routes:
        records = [record for record in run.records if record.route == route]
        results.append(_summarize_route(run, records, route, objective, gpu))
    return results


def _summarize_route(
    run: StageRun, records: Sequence[LoadSample], route: str | None, objective: Objective, gpu: GpuUse | None
) -> StageResult:
    """Computes the result of the records of one route. ``route`` is ``None`` for a stage that used no routes."""
    if route is not None:
        gpu = None  # routes take turns: the energy that each of them took is unknown
    answers = read_answers(records)
    served = [answer for answer in answers if answer.record.outcome is SampleOutcome.SERVED]
    token_counts = TokenCounts.of(answers)
    output_tokens, prompt_tokens = token_counts.sum_of(answers), sum_prompt_tokens(answers)
    # Several routes take turns in one stage: the time of a route is the sum of its own requests' times.
    seconds = run.duration_s if route is None else math.fsum(record.ended_s - record.sent_s for record in records)
    stage = run.stage
    unfinished = sum(record.outcome is SampleOutcome.UNFINISHED for record in records)
    # Whether an unfinished request would have met the objective is unknown, so it is no part of the rates.
    judged = len(records) - unfinished
    # The loaded part is the time in which all slots were busy. Routes take turns, one request at a time: none of them
    # has such a part.
    loaded = find_loaded_part(stage.concurrency, records) if route is None else None
    result = StageResult(
        name=stage.name,
        kind=stage.kind,
        node=stage.node,
        route=route,
        concurrency=stage.concurrency,
        duration_s=seconds,
        requests=len(records),
        served=len(served),
        failed=sum(record.outcome is SampleOutcome.FAILED for record in records),
        cut=sum(record.outcome is SampleOutcome.CUT for record in records),
        retried=sum(answer.record.attempts > 1 for answer in served),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        latency=latency_of(served),
        rates=with_loaded_rates(
            rates_of(served, output_tokens, prompt_tokens, seconds=seconds, judged=judged, objective=objective),
            answers,
            loaded,
            token_counts,
            duration_s=seconds,
            objective=objective,
        ),
        client=run.client,
        nodes=node_shares(served, loaded, token_counts, shared_beginnings=prompts_share_beginnings(stage)),
        failures=_failures(records),
        gpu=gpu,
        tokens_per_joule=ratio(output_tokens, gpu.energy_j if gpu is not None else None),
        phases=phases_of(run, answers, token_counts),
        disturbance=run.disturbance,
        coverage=coverage_of(stage, answers, token_counts),
        conditions=run.conditions,
        planned=len(stage.requests),
        unfinished=unfinished,
    )
    # The intervals are computed last, from the result's rates.
    intervals = rate_intervals(
        answers, stage.concurrency, result.rates, result.tokens_per_joule, objective, token_counts
    )
    return replace(result, intervals=intervals)


def _failures(records: Iterable[LoadSample]) -> tuple[FailureCount, ...]:
    """The reasons why requests failed, the most frequent first, at most ``MAX_FAILURES`` reasons."""
    counts = Counter((record.error_code, record.error or "") for record in records if record.error_code is not None)
    return tuple(FailureCount(code, message, count) for (code, message), count in counts.most_common(MAX_FAILURES))
