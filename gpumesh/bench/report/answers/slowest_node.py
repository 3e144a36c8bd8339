"""Which node is the slowest, and the likely reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult, NodeEnvironment
from gpumesh.bench.workload.stages import StageKind

# A figure of one node that is below this share of another node's is lower; a smaller difference is noise.
CLEARLY_LESS = 0.9
FAR_AWAY_SHARE = 0.1  # of a request's time: a longer way than this slows the node


@dataclass(frozen=True, slots=True)
class _MeasuredNode:
    """A node with what was measured of it: ``tokens_per_s`` while it was measured alone, or of each of its answers in
    the mesh. ``alone`` is the stage of the node alone, ``None`` if there is none."""

    environment: NodeEnvironment
    tokens_per_s: float
    each_tokens_per_s: float | None
    alone: StageResult | None


def slowest_node_sentence(result: BenchResult) -> str:
    """The slowest node against the fastest, and why; empty unless two nodes were measured."""
    nodes = _measured_nodes(result)
    if len(nodes) < 2:
        return ""
    slowest = min(nodes, key=lambda node: node.tokens_per_s)
    fastest = max(nodes, key=lambda node: node.tokens_per_s)
    low, high = format_number(slowest.tokens_per_s), format_number(fastest.tokens_per_s)
    basis = "alone" if slowest.alone is not None else "for each answer"
    if slowest.tokens_per_s >= CLEARLY_LESS * fastest.tokens_per_s:
        return f"None: all nodes are about equally fast ({low} to {high} tokens/s {basis})."
    name, other = slowest.environment.name, fastest.environment.name
    return f"{name} gives {low} tokens/s {basis}, {other} {high}: {_find_reason(slowest, fastest)}."


def _measured_nodes(result: BenchResult) -> list[_MeasuredNode]:
    """The nodes whose rate is known: all of them alone, or else all of them by their answers in the mesh."""
    environments = {node.name: node for node in result.environment.nodes}
    alone = {
        stage.node: stage
        for stage in result.stages
        if stage.kind is StageKind.NODE and stage.route is None and stage.node in environments
    }
    measured = []
    for name, stage in alone.items():
        rate = stage.rates.best_tokens_per_s
        if rate and name is not None:
            measured.append(_MeasuredNode(environments[name], rate, stage.rates.server.p50, stage))
    if measured:
        return measured
    shares = {share.node: share for stage in result.stages if stage.node is None for share in stage.nodes}
    return [
        _MeasuredNode(environments[name], share.server_tokens_per_s, share.server_tokens_per_s, None)
        for name, share in shares.items()
        if share.server_tokens_per_s and name in environments
    ]


def _find_reason(slow: _MeasuredNode, fast: _MeasuredNode) -> str:
    """The likely reason: the first of these that fits."""
    stage = slow.alone
    if stage is not None and stage.failed + stage.cut:
        return f"{stage.failed + stage.cut} of its {stage.requests} requests failed"
    if slow.environment.gpus == () and fast.environment.gpus:
        return "it has no GPU"
    is_slower_each = _is_less(slow.each_tokens_per_s, fast.each_tokens_per_s)
    if is_slower_each and _gpus(slow) and _gpus(fast) and _gpus(slow) != _gpus(fast):
        return f"its GPU is {_gpus(slow)}, the other's is {_gpus(fast)}"
    if is_slower_each:
        each, other_each = format_number(slow.each_tokens_per_s), format_number(fast.each_tokens_per_s)
        return f"its server gives each answer {each} tokens/s, the other's {other_each}"
    slow_level, fast_level = _level(slow), _level(fast)
    if slow_level is not None and fast_level is not None and slow_level < fast_level:
        requests = "1 request" if slow_level == 1 else f"{slow_level} requests"
        return f"it answers {requests} at once, the other {fast_level}"
    if stage is not None:
        load_ms, end_to_end_ms = stage.latency.server_load.max, stage.latency.end_to_end.mean
        if load_ms and end_to_end_ms and load_ms > end_to_end_ms:
            return f"it loaded the model meanwhile ({format_number(load_ms / 1000)} s)"
        outside_ms, median_ms = stage.latency.outside_server.p50, stage.latency.end_to_end.p50
        if outside_ms and median_ms and outside_ms > FAR_AWAY_SHARE * median_ms:
            return f"each of its requests spends {format_number(outside_ms)} ms outside the server"
    return "the reason is in none of the figures"


def _is_less(value: float | None, other: float | None) -> bool:
    """Whether the value is clearly less than the other; not if one is unknown."""
    return value is not None and other is not None and value < CLEARLY_LESS * other


def _level(node: _MeasuredNode) -> int | None:
    """How many requests were in flight while the node was measured alone."""
    return None if node.alone is None else node.alone.concurrency


def _gpus(node: _MeasuredNode) -> str:
    """The names of its GPUs, each once."""
    return " and ".join(dict.fromkeys(node.environment.gpus or ()))
