"""Computes a benchmark stage's figures (latency, rates, shares, failures, scaling, route costs) from its records. Pure.

``stats`` defines the terms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.load.samples import ClientLoad, LoadSample, SampleOutcome, StageRun
from gpumesh.bench.stats import Objective, SampleSummary, gaps_ms, rate, ratio, summarize_sample, tpot_ms
from gpumesh.bench.workload.stages import Stage, StageKind

MAX_FAILURES = 10  # the number of different reasons that are listed for a stage


@dataclass(frozen=True, slots=True)
class Latency:
    """The latencies of a stage's served requests, in ms. ``server_load`` is the server's own time to load the model."""

    ttft: SampleSummary
    tpot: SampleSummary
    itl: SampleSummary
    end_to_end: SampleSummary
    server_load: SampleSummary
    outside_server: SampleSummary
    """End-to-end minus the server's own total: the network, our own code, and every queue in front of the server."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens and requests per second.

    ``server`` is the rate (tokens/s) of each answer by the server's clock. ``wall`` is the same rate by our clock, from
    the first piece to the last. The others are rates of the whole stage. ``good_share`` is the share of the requests
    that met the objectives, from 0 to 1.

    ``loaded_tokens_per_s`` is the output rate of a closed loop until its last request was sent. Until then every slot
    was taken. It leaves out the end of the stage, when the faster nodes are idle already.
    """

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
    """The part of a stage's served requests that one node served: ``served`` is their number, ``share`` from 0 to 1.

    ``server_tokens_per_s`` is the mean rate of its answers by the server's clock.
    """

    node: str
    served: int
    share: float
    output_tokens: int
    server_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage that was disturbed: ``before``, ``during`` or ``after`` the disturbance.

    A request belongs to the phase in which it was sent, a token to the phase in which it arrived. ``failed`` includes
    the requests whose answer was cut. ``longest_gap_ms``: the longest time between two pieces of one answer.
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

    ``retried`` is the number of requests that were served after more than one attempt. ``counted_pieces`` is the number
    of answers whose tokens are a count of pieces (``LoadSample``).
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
    """How well the mesh uses its nodes. ``efficiency``: the mesh's output tokens/s ÷ the sum of the nodes alone.

    1 is perfect. ``nodes`` are the names and rates of the nodes alone. All rates are ``Rates.loaded_tokens_per_s``, or
    ``Rates.output_tokens_per_s`` if one of these is unknown.
    """

    mesh_tokens_per_s: float
    sum_tokens_per_s: float
    efficiency: float
    nodes: tuple[tuple[str, float], ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class RouteCost:
    """The cost of one route to a node: the p50 of its latencies, in ms.

    ``added_p50_ms`` is the difference from the first (shortest) route to the same node.
    """

    node: str
    route: str
    end_to_end_p50_ms: float | None
    outside_server_p50_ms: float | None
    added_p50_ms: float | None


def stage_label(stage: StageResult) -> str:
    """The name of a stage, with its route if it has one. It is unique in a result."""
    return stage.name if stage.route is None else f"{stage.name} via {stage.route}"


def summarize_stage(run: StageRun, objective: Objective, gpu: GpuUse | None = None) -> list[StageResult]:
    """Computes the results of a stage: one result, or one result for each route if the stage used several.

    ``gpu`` is the use of the GPUs during the stage, ``None`` if unknown.
    """
    routes = list(dict.fromkeys(record.route for record in run.records)) or [None]  # each route once, in order
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
        gpu=gpu,
        tokens_per_joule=ratio(float(output_tokens), gpu.energy_j if gpu is not None else None),
        phases=_phases(run, records),
        disturbance=run.disturbance,
        counted_pieces=sum(record.counted_pieces for record in served),
    )


def request_tpot_ms(record: LoadSample) -> float | None:
    """Computes the TPOT of one request in ms, up to its last token: the final frame has no text and does not count."""
    return tpot_ms(record.ttft_ms, record.last_token_ms, record.tokens)


def _latency(served: Sequence[LoadSample]) -> Latency:
    """Summarizes the latencies of the served requests."""
    return Latency(
        ttft=summarize_sample(record.ttft_ms for record in served),
        tpot=summarize_sample(request_tpot_ms(record) for record in served),
        itl=summarize_sample(gap for record in served for gap in gaps_ms(record.arrivals_s)),
        end_to_end=summarize_sample(record.end_to_end_ms for record in served),
        server_load=summarize_sample(record.counters.load_ms if record.counters else None for record in served),
        outside_server=summarize_sample(_outside_server_ms(record) for record in served),
    )


def _outside_server_ms(record: LoadSample) -> float | None:
    """The part of a request's time that the server did not count as its own, in ms, from the moment it was sent.

    ``None`` if the server gave no total time.
    """
    server_ms = record.counters.total_ms if record.counters else None
    if server_ms is None:
        return None
    return (record.ended_s - record.sent_s) * 1000.0 - server_ms


def _rates(
    served: Sequence[LoadSample],
    output_tokens: int,
    prompt_tokens: int,
    *,
    seconds: float,
    sent: int,
    objective: Objective,
) -> Rates:
    """The rates of a stage, or of a route, that took ``seconds``. ``sent`` is the number of all its requests."""
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
    """Computes ``Rates.loaded_tokens_per_s``. ``None`` for an open loop, and if all requests were sent at once."""
    if stage.concurrency is None or len(records) <= stage.concurrency:
        return None
    last_sent_s = max(record.sent_s for record in records)
    return rate(_tokens_between(records, 0.0, last_sent_s), last_sent_s)


def _meets_objective(record: LoadSample, objective: Objective) -> bool:
    """Whether the request counts for goodput. An answer of one token has no TPOT, so only its TTFT matters.

    A request whose TTFT is unknown does not count.
    """
    ttft, tpot = record.ttft_ms, request_tpot_ms(record)
    if ttft is None or ttft > objective.ttft_ms:
        return False
    return tpot is None or tpot <= objective.tpot_ms


def _wall_rate(record: LoadSample) -> float | None:
    """The tokens/s of one answer by our own clock. ``None`` if its TPOT is unknown or 0."""
    tpot = request_tpot_ms(record)
    return 1000.0 / tpot if tpot else None


def _shares(served: Sequence[LoadSample]) -> tuple[NodeShare, ...]:
    """The part of the served requests that each node has served, in the order of the nodes' names."""
    by_node: dict[str, list[LoadSample]] = {}
    for record in served:
        if record.node is not None:
            by_node.setdefault(record.node, []).append(record)
    shares: list[NodeShare] = []
    for node, records in sorted(by_node.items()):
        server_rates = summarize_sample(record.counters.tokens_per_s if record.counters else None for record in records)
        share = NodeShare(
            node,
            served=len(records),
            share=len(records) / len(served),
            output_tokens=sum(record.tokens or 0 for record in records),
            server_tokens_per_s=server_rates.mean,
        )
        shares.append(share)
    return tuple(shares)


def _failures(records: Iterable[LoadSample]) -> tuple[FailureCount, ...]:
    """The reasons why requests failed, the most frequent first, at most ``MAX_FAILURES`` reasons."""
    counts = Counter((record.error_code, record.error or "") for record in records if record.error_code is not None)
    return tuple(FailureCount(code, message, count) for (code, message), count in counts.most_common(MAX_FAILURES))


def _phases(run: StageRun, records: Sequence[LoadSample]) -> tuple[Phase, ...]:
    """The three phases of a stage that was disturbed, in the order of time; empty for another stage."""
    if run.disturbed_s is None:
        return ()
    begin_s, end_s = run.disturbed_s
    return (
        _phase("before", records, 0.0, begin_s),
        _phase("during", records, begin_s, end_s),
        _phase("after", records, end_s, run.duration_s),
    )


def _phase(name: str, records: Sequence[LoadSample], start_s: float, end_s: float) -> Phase:
    """The figures of the phase from ``start_s`` to ``end_s`` (seconds of the stage)."""
    phase_records = [record for record in records if start_s <= record.sent_s < end_s]
    gaps = [gap_ms for record in phase_records for gap_ms in gaps_ms(record.arrivals_s)]
    return Phase(
        name,
        requests=len(phase_records),
        failed=sum(record.outcome is not SampleOutcome.SERVED for record in phase_records),
        retried=sum(record.attempts > 1 for record in phase_records),
        end_to_end=summarize_sample(record.end_to_end_ms for record in phase_records),
        output_tokens_per_s=rate(_tokens_between(records, start_s, end_s), end_s - start_s),
        longest_gap_ms=max(gaps, default=None),
    )


def _tokens_between(records: Sequence[LoadSample], start_s: float, end_s: float) -> float:
    """The number of tokens that arrived from ``start_s`` to ``end_s`` (seconds of the stage).

    All pieces of an answer count as equal shares of the answer's tokens.
    """
    token_counts: list[float] = []
    for record in records:
        if record.arrivals_s:
            tokens_per_piece = (record.tokens or 0) / len(record.arrivals_s)
            pieces = sum(start_s <= arrival_s < end_s for arrival_s in record.arrivals_s)
            token_counts.append(tokens_per_piece * pieces)
    return math.fsum(token_counts)


def scaling(stages: Sequence[StageResult]) -> Scaling | None:
    """Compares the output rate of the mesh's last stage with that of the nodes alone.

    ``None`` if there are fewer than two nodes or no stage of the mesh, or if one of them produced no tokens.
    """
    # Left out: a stage with routes, which measures the routes, and a stage that was disturbed.
    node_stages = [stage for stage in stages if stage.kind is StageKind.NODE and stage.node and stage.route is None]
    mesh_stages = [stage for stage in stages if stage.kind is StageKind.MESH and not stage.disturbance]
    if not mesh_stages or len(node_stages) < 2:  # a single node cannot scale
        return None
    compared = [*node_stages, mesh_stages[-1]]
    rates = [stage.rates.loaded_tokens_per_s for stage in compared]
    if not all(rates):  # one is unknown or 0: so all are replaced, because only rates of one kind can be compared
        rates = [stage.rates.output_tokens_per_s for stage in compared]
    known_rates = [value for value in rates if value]
    if len(known_rates) != len(compared):  # a stage produced no tokens
        return None
    *node_rates, mesh_rate = known_rates
    sum_of_nodes = math.fsum(node_rates)
    by_node = tuple((stage.node or "", value) for stage, value in zip(node_stages, node_rates, strict=True))
    return Scaling(mesh_rate, sum_of_nodes, mesh_rate / sum_of_nodes, by_node)


def route_costs(stages: Sequence[StageResult]) -> tuple[RouteCost, ...]:
    """Computes the cost of each route, compared to the first route to the same node whose latency is known."""
    costs = []
    baselines_ms: dict[str, float] = {}  # the latency of the first route, by node
    for stage in stages:
        if stage.route is None or stage.node is None:
            continue
        end_to_end_ms, outside_ms = stage.latency.end_to_end.p50, stage.latency.outside_server.p50
        # The time outside the server is preferred: the server's own time varies more than the cost of a route.
        latency_ms = end_to_end_ms if outside_ms is None else outside_ms
        added_ms = None
        if latency_ms is not None:
            added_ms = latency_ms - baselines_ms.setdefault(stage.node, latency_ms)
        costs.append(RouteCost(stage.node, stage.route, end_to_end_ms, outside_ms, added_ms))
    return tuple(costs)
