"""The answers of the scenarios that do not ask how much the mesh can do: ``overhead`` and ``failover``. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gpumesh.bench.figures.outages.failover import FailoverFigures
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.route_names import is_control


def route_sentences(result: BenchResult) -> Iterator[str]:
    """A sentence for each node: what the way to it costs, and what each part of the way adds."""
    for node, costs in itertools.groupby(result.routes, key=lambda cost: cost.node):
        shortest, *others = costs  # the result lists the routes of a node from the shortest on
        if shortest.outside_server_p50_ms is None:
            continue
        added = list(_added_parts(result, node)) or [
            f"the {cost.route} adds {format_number(cost.added_p50_ms)} ms"  # a result of an older version
            for cost in others
            if cost.added_p50_ms is not None
        ]
        way = f"{node}: a request spends {format_number(shortest.outside_server_p50_ms)} ms outside the server"
        yield f"{way} (median, {shortest.route}){''.join(f'; {text}' for text in added)}."


def _added_parts(result: BenchResult, node: str) -> Iterator[str]:
    """What each part of the way to a node adds, if the rounds can tell."""
    for difference in result.route_differences:
        if difference.node != node or is_control(difference.route):
            continue
        if difference.is_noise:
            yield f"the {difference.route} adds nothing that could be measured"
        else:
            interval = ""
            if difference.low_ms is not None and difference.high_ms is not None:
                interval = f" ({difference.low_ms:.2f} to {difference.high_ms:.2f})"
            yield f"the {difference.route} adds {difference.added_ms:.2f} ms{interval}"


def failover_sentence(result: BenchResult) -> str:
    """What the clients noticed of a node that went away, and when the mesh did; empty if no stage was disturbed."""
    clients = clients_sentence(result)
    if not clients or result.failover is None:
        return clients
    return " ".join([clients, *_describe_outage(result.failover)])


def clients_sentence(result: BenchResult) -> str:
    """What the clients noticed of a node that went away; empty if no stage was disturbed."""
    return " ".join(_describe_clients(stage, result.failover) for stage in result.stages if stage.phases)


def _describe_clients(stage: StageResult, figures: FailoverFigures | None) -> str:
    """How many requests failed, went to another node or were continued there, and the longest pause."""
    failed = stage.failed + stage.cut
    parts = [f"{failed or 'none'} of {stage.requests} requests failed"]
    retried, continued = (stage.retried, 0) if figures is None else (figures.retried, figures.continued)
    if retried:
        parts.append(f"{retried} were sent again to another node")
    if continued:
        parts.append(f"{continued} answers were continued by another node")
    gaps = {phase.name: phase.longest_gap_ms for phase in stage.phases}
    longest, usual = gaps.get("during"), gaps.get("before")
    if figures is not None:
        longest, usual = figures.longest_gap_ms, figures.usual_gap_ms
    pause = ""
    if longest is not None:
        pause = f" The longest pause in an answer was {format_number(longest)} ms"
        pause += "." if usual is None else f" ({format_number(usual)} ms before)."
    return f"{stage.disturbance or 'A node went away'} under load: {', '.join(parts)}.{pause}"


def _describe_outage(figures: FailoverFigures) -> Iterator[str]:
    """When the mesh noticed, what came twice or not at all, and when the node served again."""
    if figures.noticed_ms is not None:
        yield f"The mesh noticed after {format_number(figures.noticed_ms)} ms."
    if figures.tokens_repeated is not None and figures.tokens_lost is not None:
        repeated, lost = figures.tokens_repeated or "none", figures.tokens_lost or "none"
        yield f"Of the tokens of continued answers, {repeated} came twice and {lost} are missing."
    if figures.serves_ms is not None:
        yield f"The node served again {format_number(figures.serves_ms)} ms after it was put back."
