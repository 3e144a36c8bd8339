"""Computes the figures of a stage from its request records. Pure; ``stats`` defines the terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpumesh.bench.gpu_meter import GpuUse
from gpumesh.bench.load import ClientLoad, LoadSample, SampleOutcome, StageRun
from gpumesh.bench.scenarios import Stage, StageKind
from gpumesh.bench.stats import Objective, SampleSummary, gaps_ms, rate, ratio, summarize_sample, tpot_ms

MAX_FAILURES = 10  # different reasons that are listed for a stage


@dataclass(frozen=True, slots=True)
class Latency:
    """All in ms. ``server_load`` is the time that the server reports for loading the model."""

    ttft: SampleSummary
    tpot: SampleSummary
    itl: SampleSummary
    end_to_end: SampleSummary
    server_load: SampleSummary
    outside_server: SampleSummary
    """End-to-end minus the server's own total: the network, our own code, and every queue in front of the server."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens and requests per second. ``server`` is the rate of each answer by the server's clock. ``wall`` is the same
    by our clock, from the first piece to the last. The others are rates of the whole stage.

    ``loaded_tokens_per_s`` is the output rate of a closed loop until its last request was sent. Until then every slot
    was taken. It leaves out the end of the stage, when the faster nodes are idle already."""

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
    """The part of a stage that one node served."""

    node: str
    served: int
    share: float
    output_tokens: int
    server_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage that was disturbed: ``before``, ``during`` or ``after`` the disturbance.

    A request belongs to the phase in which it was sent, a token to the phase in which it arrived. ``longest_gap_ms``:
    the longest time between two pieces of one answer.
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
    """The figures of a stage, or of one route of a stage. ``requests`` = ``served`` + ``failed`` + ``cut``.
    ``retried``: served after more than one attempt. ``counted_pieces``: answers whose tokens are a count of pieces
    (``LoadSample``)."""

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
    """``efficiency``: the mesh's output tokens/s ÷ the sum of its nodes alone; 1 is perfect. The rates are
    ``Rates.loaded_tokens_per_s`` if all of them are known."""

    mesh_tokens_per_s: float
    sum_tokens_per_s: float
    efficiency: float
    nodes: tuple[tuple[str, float], ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class RouteCost:
    """The cost of a route, p50 in ms: outside the server, and compared to the first (shortest) route to the node."""

    node: str
    route: str
    end_to_end_p50_ms: float | None
    outside_server_p50_ms: float | None
    added_p50_ms: float | None


def stage_label(stage: StageResult) -> str:
    return stage.name if stage.route is None else f"{stage.name} via {stage.route}"


def summarize_stage(run: StageRun, objective: Objective, gpu: GpuUse | None = None) -> list[StageResult]:
    """The results of a stage: one, or one for each route if it used several."""
    routes = list(dict.fromkeys(record.route for record in run.records)) or [None]
    return [
        _summarize_route(run, [record for record in run.records if record.route == route], route, objective, gpu)
        for route in routes
    ]


def _summarize_route(
    run: StageRun, records: Sequence[LoadSample], route: str | None, objective: Objective, gpu: GpuUse | None
) -> StageResult:
    served = [record for record in records if record.outcome is SampleOutcome.SERVED]
    output_tokens = sum(record.tokens or 0 for record in records)
    prompt_tokens = sum(record.prompt_tokens or 0 for record in records)
    # Several routes take turns in one stage: the time of a route is the sum of its own requests' times.
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
        failed=sum(record.outcome is SampleOutcome.FAILED for record in records),
        cut=sum(record.outcome is SampleOutcome.CUT for record in records),
        retried=sum(record.attempts > 1 for record in served),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        latency=_latency(served),
        rates=replace(
            _rates(served, output_tokens, prompt_tokens, seconds=seconds, sent=len(records), objective=objective),
            loaded_tokens_per_s=_loaded_rate(stage, records) if route is None else None,
        ),
        client=run.client,
        nodes=_shares(served),
        failures=_failures(records),
        # When routes take turns, the energy of each is unknown.
        gpu=gpu if route is None else None,
        tokens_per_joule=ratio(float(output_tokens), gpu.energy_j if gpu is not None and route is None else None),
        phases=_phases(run, records),
        disturbance=run.disturbance,
        counted_pieces=sum(record.counted_pieces for record in served),
    )


def request_tpot_ms(record: LoadSample) -> float | None:
    """The TPOT of one request, up to its last token: the final frame carries no text and does not count."""
    return tpot_ms(record.ttft_ms, record.last_token_ms, record.tokens)


def _latency(served: Sequence[LoadSample]) -> Latency:
    return Latency(
        ttft=summarize_sample(record.ttft_ms for record in served),
        tpot=summarize_sample(request_tpot_ms(record) for record in served),
        itl=summarize_sample(gap for record in served for gap in gaps_ms(record.arrivals_s)),
        end_to_end=summarize_sample(record.end_to_end_ms for record in served),
        server_load=summarize_sample(record.counters.load_ms if record.counters else None for record in served),
        outside_server=summarize_sample(_outside_server_ms(record) for record in served),
    )


def _outside_server_ms(record: LoadSample) -> float | None:
    total = record.counters.total_ms if record.counters else None
    return None if total is None else (record.ended_s - record.sent_s) * 1000.0 - total


def _rates(
    served: Sequence[LoadSample],
    output_tokens: int,
    prompt_tokens: int,
    *,
    seconds: float,
    sent: int,
    objective: Objective,
) -> Rates:
    good_count = sum(_meets_objective(record, objective) for record in served)
    return Rates(
        server=summarize_sample(record.counters.tokens_per_s if record.counters else None for record in served),
        wall=summarize_sample(_wall_rate(record) for record in served),
        output_tokens_per_s=rate(output_tokens, seconds),
        total_tokens_per_s=rate(output_tokens + prompt_tokens, seconds),
        requests_per_s=rate(len(served), seconds),
        goodput_per_s=rate(good_count, seconds),
        good_share=good_count / sent if sent else None,
    )


def _loaded_rate(stage: Stage, records: Sequence[LoadSample]) -> float | None:
    """See ``Rates.loaded_tokens_per_s``. ``None`` for an open loop, and if all requests were sent at once."""
    if stage.concurrency is None or len(records) <= stage.concurrency:
        return None
    last_sent_s = max(record.sent_s for record in records)
    return rate(_tokens_between(records, 0.0, last_sent_s), last_sent_s)


def _meets_objective(record: LoadSample, objective: Objective) -> bool:
    """Whether the request counts for goodput. An answer of one token has no TPOT, so only its TTFT matters."""
    ttft, tpot = record.ttft_ms, request_tpot_ms(record)
    return ttft is not None and ttft <= objective.ttft_ms and (tpot is None or tpot <= objective.tpot_ms)


def _wall_rate(record: LoadSample) -> float | None:
    """The tokens/s of one answer by our own clock."""
    tpot = request_tpot_ms(record)
    return 1000.0 / tpot if tpot else None


def _shares(served: Sequence[LoadSample]) -> tuple[NodeShare, ...]:
    by_node: dict[str, list[LoadSample]] = {}
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


def _failures(records: Iterable[LoadSample]) -> tuple[FailureCount, ...]:
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        if record.error_code is not None:
            key = (record.error_code, record.error or "")
            counts[key] = counts.get(key, 0) + 1
    most_frequent = sorted(counts.items(), key=lambda entry: -entry[1])[:MAX_FAILURES]
    return tuple(FailureCount(code, message, count) for (code, message), count in most_frequent)


def _phases(run: StageRun, records: Sequence[LoadSample]) -> tuple[Phase, ...]:
    if run.disturbed_s is None:
        return ()
    begin_s, end_s = run.disturbed_s
    spans = (("before", 0.0, begin_s), ("during", begin_s, end_s), ("after", end_s, run.duration_s))
    return tuple(
        _phase(
            name,
            [record for record in records if low <= record.sent_s < high],
            _tokens_between(records, low, high),
            high - low,
        )
        for name, low, high in spans
    )


def _phase(name: str, records: Sequence[LoadSample], tokens: float, seconds: float) -> Phase:
    return Phase(
        name,
        len(records),
        sum(record.outcome is not SampleOutcome.SERVED for record in records),
        sum(record.attempts > 1 for record in records),
        summarize_sample(record.end_to_end_ms for record in records),
        rate(tokens, seconds),
        max((gap for record in records for gap in gaps_ms(record.arrivals_s)), default=None),
    )


def _tokens_between(records: Sequence[LoadSample], low: float, high: float) -> float:
    """The tokens that arrived from ``low`` to ``high`` (seconds of the stage). All pieces of an answer count as equal
    shares of its tokens."""
    return math.fsum(
        (record.tokens or 0) / len(record.arrivals_s) * sum(low <= moment < high for moment in record.arrivals_s)
        for record in records
        if record.arrivals_s
    )


def scaling(stages: Sequence[StageResult]) -> Scaling | None:
    """Compares the last stage of the mesh with the nodes alone. ``None`` if either is missing or produced no tokens."""
    node_stages = [stage for stage in stages if stage.kind is StageKind.NODE and stage.node and stage.route is None]
    mesh_stages = [stage for stage in stages if stage.kind is StageKind.MESH and not stage.disturbance]
    if not mesh_stages or len(node_stages) < 2:  # a single node cannot scale
        return None
    compared = [*node_stages, mesh_stages[-1]]
    rates = [stage.rates.loaded_tokens_per_s for stage in compared]
    if not all(rates):  # then none of the better rates is used, so that equal things are compared
        rates = [stage.rates.output_tokens_per_s for stage in compared]
    known_rates = [value for value in rates if value]
    if len(known_rates) != len(compared):
        return None
    *node_rates, mesh_rate = known_rates
    total = math.fsum(node_rates)
    by_node = tuple((stage.node or "", value) for stage, value in zip(node_stages, node_rates, strict=True))
    return Scaling(mesh_rate, total, mesh_rate / total, by_node)


def route_costs(stages: Sequence[StageResult]) -> tuple[RouteCost, ...]:
    """The cost of each route, compared to the first route to the same node."""
    costs = []
    baseline: dict[str, float] = {}  # of the first route, by node
    for stage in stages:
        if stage.route is None or stage.node is None:
            continue
        end_to_end, outside = stage.latency.end_to_end.p50, stage.latency.outside_server.p50
        # The time outside the server is preferred: the server's own time varies more than the cost of a route.
        compared = end_to_end if outside is None else outside
        if compared is not None:
            baseline.setdefault(stage.node, compared)
        added = None if compared is None else compared - baseline[stage.node]
        costs.append(RouteCost(stage.node, stage.route, end_to_end, outside, added))
    return tuple(costs)
