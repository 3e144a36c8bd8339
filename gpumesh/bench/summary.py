"""From the records of a stage to its figures. Pure; the terms are those of ``stats``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpumesh.bench.gpu_meter import GpuUse
from gpumesh.bench.load import ClientLoad, RequestOutcome, RequestRecord, StageRun
from gpumesh.bench.scenarios import Stage, StageKind
from gpumesh.bench.stats import Objective, SampleSummary, gaps_ms, rate, ratio, summarize_sample, tpot_ms


@dataclass(frozen=True, slots=True)
class Latency:
    """All in ms. ``server_load`` is the time that the server says it spent loading the model."""

    ttft: SampleSummary
    tpot: SampleSummary
    itl: SampleSummary
    end_to_end: SampleSummary
    server_load: SampleSummary
    outside_server: SampleSummary
    """End-to-end less the server's own total: the way there and back, and every queue before the server."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens and requests per second. ``server`` is each answer's rate by the server's own clock; ``wall`` the same by
    ours, from first to last piece; the others are of the stage as a whole.

    ``loaded_tokens_per_s`` is the output of a closed loop until it had no request left to send: while every place was
    taken, without the end at which the faster nodes have nothing more to do."""

    server: SampleSummary
    wall: SampleSummary
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    goodput_per_s: float | None = None
    good_share: float | None = None
    loaded_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What one node did of a stage."""

    node: str
    served: int
    share: float
    output_tokens: int
    server_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage with a disturbance in it: ``before``, ``during``, ``after``.

    A request belongs to the phase in which it was sent, a token to the one in which it came. ``longest_gap_ms``: the
    longest that one of its requests waited between two pieces of its answer.
    """

    name: str
    requests: int
    failed: int
    retried: int
    end_to_end: SampleSummary
    output_tokens_per_s: float | None = None
    longest_gap_ms: float | None = None


@dataclass(frozen=True, slots=True)
class FailureCount:
    """Requests that failed for the same reason."""

    code: str
    message: str
    count: int


@dataclass(frozen=True, slots=True)
class StageResult:
    """``requests`` = ``served`` + ``failed`` + ``cut``. ``retried``: served after more than one attempt."""

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
    prompt_tokens: int
    output_tokens: int
    latency: Latency
    rates: Rates
    client: ClientLoad
    nodes: tuple[NodeShare, ...] = ()
    failures: tuple[FailureCount, ...] = ()
    gpu: GpuUse | None = None
    tokens_per_joule: float | None = None
    phases: tuple[Phase, ...] = ()
    disturbance: str | None = None
    counted_pieces: int = 0


@dataclass(frozen=True, slots=True)
class Scaling:
    """``efficiency``: the mesh's output tokens/s ÷ the sum of its nodes alone, each while every place was taken where
    that is known. 1 is perfect."""

    mesh_tokens_per_s: float
    sum_tokens_per_s: float
    efficiency: float
    nodes: tuple[tuple[str, float], ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class RouteCost:
    """What a route adds, at p50 in ms: to the server's own time, and to the first (the barest) route to that node."""

    node: str
    route: str
    end_to_end_p50_ms: float | None
    outside_server_p50_ms: float | None
    added_p50_ms: float | None


def summarize_stage(run: StageRun, objective: Objective, gpu: GpuUse | None = None) -> list[StageResult]:
    """A stage's result; one for each route where it used several."""
    routes = list(dict.fromkeys(record.route for record in run.records)) or [None]
    return [_one(run, [r for r in run.records if r.route == route], route, objective, gpu) for route in routes]


def _one(
    run: StageRun, records: Sequence[RequestRecord], route: str | None, objective: Objective, gpu: GpuUse | None
) -> StageResult:
    served = [record for record in records if record.outcome is RequestOutcome.SERVED]
    output = sum(record.tokens or 0 for record in records)
    prompt = sum(record.prompt_tokens or 0 for record in records)
    # A stage of several routes took turns: each one's time is that of its own requests.
    seconds = run.duration_s if route is None else math.fsum(record.ended_s - record.sent_s for record in records)
    stage = run.stage
    return StageResult(
        name=stage.name,
        kind=stage.kind,
        node=stage.node,
        route=route,
        concurrency=stage.concurrency,
        duration_s=seconds,
        requests=len(records),
        served=len(served),
        failed=sum(record.outcome is RequestOutcome.FAILED for record in records),
        cut=sum(record.outcome is RequestOutcome.CUT for record in records),
        retried=sum(record.attempts > 1 for record in served),
        prompt_tokens=prompt,
        output_tokens=output,
        latency=_latency(served),
        rates=replace(
            _rates(served, output, prompt, seconds=seconds, sent=len(records), objective=objective),
            loaded_tokens_per_s=_loaded_rate(stage, records) if route is None else None,
        ),
        client=run.client,
        nodes=_shares(served),
        failures=_failures(records),
        # Of routes that took turns nobody knows what each cost the GPU.
        gpu=gpu if route is None else None,
        tokens_per_joule=ratio(float(output), gpu.energy_j if gpu is not None and route is None else None),
        phases=_phases(run, records),
        disturbance=run.disturbance,
        counted_pieces=sum(record.counted_pieces for record in served),
    )


def request_tpot_ms(record: RequestRecord) -> float | None:
    """To the last token, not to the final frame that carries no text."""
    return tpot_ms(record.ttft_ms, record.last_token_ms, record.tokens)


def _latency(served: Sequence[RequestRecord]) -> Latency:
    return Latency(
        ttft=summarize_sample(record.ttft_ms for record in served),
        tpot=summarize_sample(request_tpot_ms(record) for record in served),
        itl=summarize_sample(gap for record in served for gap in gaps_ms(record.arrivals_s)),
        end_to_end=summarize_sample(record.end_to_end_ms for record in served),
        server_load=summarize_sample(record.counters.load_ms if record.counters else None for record in served),
        outside_server=summarize_sample(_outside(record) for record in served),
    )


def _outside(record: RequestRecord) -> float | None:
    total = record.counters.total_ms if record.counters else None
    return None if total is None else (record.ended_s - record.sent_s) * 1000.0 - total


def _rates(
    served: Sequence[RequestRecord], output: int, prompt: int, *, seconds: float, sent: int, objective: Objective
) -> Rates:
    good = sum(_good(record, objective) for record in served)
    return Rates(
        server=summarize_sample(record.counters.tokens_per_s if record.counters else None for record in served),
        wall=summarize_sample(_wall_rate(record) for record in served),
        output_tokens_per_s=rate(output, seconds),
        total_tokens_per_s=rate(output + prompt, seconds),
        requests_per_s=rate(len(served), seconds),
        goodput_per_s=rate(good, seconds),
        good_share=good / sent if sent else None,
    )


def _loaded_rate(stage: Stage, records: Sequence[RequestRecord]) -> float | None:
    if stage.concurrency is None or len(records) <= stage.concurrency:
        return None
    last = max(record.sent_s for record in records)
    return rate(_came(records, 0.0, last), last)


def _good(record: RequestRecord, objective: Objective) -> bool:
    """An answer of one token has no time between tokens that could be too long."""
    ttft, tpot = record.ttft_ms, request_tpot_ms(record)
    return ttft is not None and ttft <= objective.ttft_ms and (tpot is None or tpot <= objective.tpot_ms)


def _wall_rate(record: RequestRecord) -> float | None:
    tpot = request_tpot_ms(record)
    return 1000.0 / tpot if tpot else None


def _shares(served: Sequence[RequestRecord]) -> tuple[NodeShare, ...]:
    by_node: dict[str, list[RequestRecord]] = {}
    for record in served:
        if record.node is not None:
            by_node.setdefault(record.node, []).append(record)
    return tuple(
        NodeShare(
            node,
            len(records),
            len(records) / len(served),
            sum(record.tokens or 0 for record in records),
            summarize_sample(record.counters.tokens_per_s if record.counters else None for record in records).mean,
        )
        for node, records in sorted(by_node.items())
    )


def _failures(records: Iterable[RequestRecord]) -> tuple[FailureCount, ...]:
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        if record.error_code is not None:
            key = (record.error_code, record.error or "")
            counts[key] = counts.get(key, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return tuple(FailureCount(code, message, count) for (code, message), count in ordered[:10])


def _phases(run: StageRun, records: Sequence[RequestRecord]) -> tuple[Phase, ...]:
    if run.disturbed_s is None:
        return ()
    begin, end = run.disturbed_s
    spans = (("before", 0.0, begin), ("during", begin, end), ("after", end, run.duration_s))
    return tuple(
        _phase(
            name, [record for record in records if low <= record.sent_s < high], _came(records, low, high), high - low
        )
        for name, low, high in spans
    )


def _phase(name: str, records: Sequence[RequestRecord], tokens: float, seconds: float) -> Phase:
    return Phase(
        name,
        len(records),
        sum(record.outcome is not RequestOutcome.SERVED for record in records),
        sum(record.attempts > 1 for record in records),
        summarize_sample(record.end_to_end_ms for record in records),
        rate(tokens, seconds),
        max((gap for record in records for gap in gaps_ms(record.arrivals_s)), default=None),
    )


def _came(records: Sequence[RequestRecord], low: float, high: float) -> float:
    """The tokens that came in this time; a piece of an answer counts for its share of the answer's tokens."""
    return math.fsum(
        (record.tokens or 0) / len(record.arrivals_s) * sum(low <= moment < high for moment in record.arrivals_s)
        for record in records
        if record.arrivals_s
    )


def scaling(stages: Sequence[StageResult]) -> Scaling | None:
    """Of nodes measured alone and the last stage of the mesh; ``None`` where either is missing or gave nothing."""
    alone = [stage for stage in stages if stage.kind is StageKind.NODE and stage.node and stage.route is None]
    together = [stage for stage in stages if stage.kind is StageKind.MESH and not stage.disturbance]
    if not together or len(alone) < 2:  # one node has nothing to scale with
        return None
    compared = [*alone, together[-1]]
    values = [stage.rates.loaded_tokens_per_s for stage in compared]
    if not all(values):
        values = [stage.rates.output_tokens_per_s for stage in compared]
    known = [value for value in values if value]
    if len(known) != len(compared):
        return None
    *single, mesh = known
    total = math.fsum(single)
    return Scaling(
        mesh, total, mesh / total, tuple((stage.node or "", one) for stage, one in zip(alone, single, strict=True))
    )


def route_costs(stages: Sequence[StageResult]) -> tuple[RouteCost, ...]:
    costs = []
    first: dict[str, float] = {}
    for stage in stages:
        if stage.route is None or stage.node is None:
            continue
        whole, outside = stage.latency.end_to_end.p50, stage.latency.outside_server.p50
        # What the server itself took varies more than what a route adds.
        compared = whole if outside is None else outside
        if compared is not None:
            first.setdefault(stage.node, compared)
        added = None if compared is None else compared - first[stage.node]
        costs.append(RouteCost(stage.node, stage.route, whole, outside, added))
    return tuple(costs)
