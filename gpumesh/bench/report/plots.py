"""The plots of a report: rates, latencies, and each request over time. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.report import svg
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import SampleSummary
from gpumesh.bench.workload.settings import Scenario
from gpumesh.text.printable import printable

MAX_POINTS = 3000  # of one plot: a page with more opens slowly, and an eye sees no difference


def throughput_plots(result: BenchResult) -> list[str]:
    """The plots of rates. Those of ``sweep`` are over the concurrency."""
    stages = result.stages
    if result.scenario is Scenario.SWEEP:
        rates = _over_concurrency("tokens", stages, [stage.rates.best_tokens_per_s for stage in stages])
        goodput = _over_concurrency("goodput", stages, [stage.rates.best_goodput_per_s for stage in stages])
        title = "Output tokens per second over concurrency"
        return [
            svg.draw_points(title, [rates], "in flight", "tok/s", lines=True, mark=_knee_mark(result)),
            svg.draw_points("Goodput over concurrency", [goodput], "in flight", "req/s", lines=True),
        ]
    bars = [svg.Bar(name, stage.rates.best_tokens_per_s) for name, stage in zip(_names(stages), stages, strict=True)]
    # Only the stage of ``failover`` has phases: before, during and after the disturbance.
    bars += [svg.Bar(phase.name, phase.output_tokens_per_s) for stage in stages for phase in stage.phases]
    return [svg.draw_bars("Output tokens per second", bars, "tok/s")]


def latency_plots(result: BenchResult) -> list[str]:
    """The plots of latencies."""
    stages = result.stages
    names = _names(stages)
    if result.scenario is Scenario.OVERHEAD:
        samples = [stage.latency.outside_server for stage in stages]
        return [svg.draw_ranges("Outside the server: the way there and back", _ranges(names, samples), "ms")]
    if result.scenario is Scenario.SWEEP:
        ttft = [
            _over_concurrency("p50", stages, [stage.latency.ttft.p50 for stage in stages]),
            _over_concurrency("p90", stages, [stage.latency.ttft.p90 for stage in stages]),
        ]
        title = "Time to first token over concurrency"
        return [svg.draw_points(title, ttft, "in flight", "ms", lines=True, mark=_knee_mark(result))]
    return [
        svg.draw_ranges("Time to first token", _ranges(names, [stage.latency.ttft for stage in stages]), "ms"),
        svg.draw_ranges("End-to-end", _ranges(names, [stage.latency.end_to_end for stage in stages]), "ms"),
    ]


def request_timeline(scenario: Scenario, records: Sequence[LoadSample]) -> str:
    """A plot of the served requests of the last stage: when each was sent and how long it took, in a colour per node.

    With more than ``MAX_POINTS`` requests, only every second (third, …) request has a point. Empty without requests,
    and for ``overhead``.
    """
    if not records or scenario is Scenario.OVERHEAD:  # the last stage of ``overhead`` has one node: nothing to compare
        return ""
    last_stage = records[-1].stage
    points = [
        (record.node, record.sent_s, record.end_to_end_ms)
        for record in records
        if record.stage == last_stage and record.end_to_end_ms is not None  # ``None``: the request was not served
    ]
    step = max(math.ceil(len(points) / MAX_POINTS), 1)
    points_by_node: dict[str, list[tuple[float, float]]] = {}
    for node, sent_s, end_to_end_ms in points[::step]:
        points_by_node.setdefault(printable(node or "unknown"), []).append((sent_s, end_to_end_ms))
    series = [svg.PlotSeries(name, tuple(node_points)) for name, node_points in sorted(points_by_node.items())]
    title = f"End-to-end of each request of stage {printable(last_stage)}, by node"
    return svg.draw_points(title, series, "s", "ms", lines=False)


def _knee_mark(result: BenchResult) -> tuple[float, str] | None:
    """The place of the knee on the axis of the concurrency, with its name."""
    return None if result.knee is None else (float(result.knee.level), "knee")


def _names(stages: Sequence[StageResult]) -> list[str]:
    """The labels of the stages, as they stand in a plot."""
    return [printable(f"{stage_label(stage)} (partial)" if stage.partial else stage_label(stage)) for stage in stages]


def _ranges(names: Sequence[str], samples: Sequence[SampleSummary]) -> list[svg.Range]:
    """A row of the plot for each sample, from p50 to p99."""
    return [
        svg.Range(name, (("p50", sample.p50), ("p90", sample.p90), ("p99", sample.p99)))
        for name, sample in zip(names, samples, strict=True)
    ]


def _over_concurrency(label: str, stages: Sequence[StageResult], values: Iterable[float | None]) -> svg.PlotSeries:
    """A series of points (concurrency, value), one for each stage whose value is known."""
    points: list[tuple[float, float]] = []
    for stage, value in zip(stages, values, strict=True):
        if value is not None and stage.concurrency is not None:
            points.append((float(stage.concurrency), value))
    return svg.PlotSeries(label, tuple(points))
