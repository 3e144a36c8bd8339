"""The tables of rates and latencies in a report. Pure.

With few stages a row is a figure and a column is a stage, so that the eye compares along a row and the table fits a
narrow page. With many stages it is the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.stats import SampleSummary

MAX_STAGE_COLUMNS = 6

StageFigure: TypeAlias = tuple[str, Callable[[StageResult], str]]
"""The name of a figure, and how to write the figure of a stage."""

_FIGURES: tuple[StageFigure, ...] = (
    ("in flight", lambda stage: "open loop" if stage.concurrency is None else str(stage.concurrency)),
    ("requests", lambda stage: f"{stage.requests:,}"),
    ("failed", lambda stage: f"{stage.failed + stage.cut:,}"),
    ("time s", lambda stage: format_number(stage.duration_s)),
    ("ramp s", lambda stage: format_number(stage.rates.ramp_s)),
    ("tail s", lambda stage: format_number(stage.rates.tail_s)),
    ("output tok/s", lambda stage: format_number(stage.rates.best_tokens_per_s)),
    ("whole stage tok/s", lambda stage: format_number(stage.rates.output_tokens_per_s)),
    ("total tok/s", lambda stage: format_number(stage.rates.total_tokens_per_s)),
    ("req/s", lambda stage: format_number(stage.rates.best_requests_per_s)),
    ("goodput req/s", lambda stage: format_number(stage.rates.best_goodput_per_s)),
    ("server tok/s p50", lambda stage: format_number(stage.rates.server.p50)),
)

_LATENCIES: tuple[tuple[str, Callable[[StageResult], SampleSummary]], ...] = (
    ("TTFT", lambda stage: stage.latency.ttft),
    ("TPOT", lambda stage: stage.latency.tpot),
    ("inter-token", lambda stage: stage.latency.itl),
    ("end-to-end", lambda stage: stage.latency.end_to_end),
    ("outside the server", lambda stage: stage.latency.outside_server),
    ("in the server's queue", lambda stage: stage.latency.server_wait),
)

_SAMPLE_FIGURES: tuple[tuple[str, Callable[[SampleSummary], str]], ...] = (
    ("n", lambda sample: f"{sample.n:,}"),
    ("p50", lambda sample: format_number(sample.p50)),
    ("p90", lambda sample: format_number(sample.p90)),
    ("p99", lambda sample: format_number(sample.p99)),
    ("mean", lambda sample: format_number(sample.mean)),
    ("max", lambda sample: format_number(sample.max)),
)


def throughput_table(stages: Sequence[StageResult]) -> str:
    """The table of rates.

    Output tokens, requests and goodput are those while all slots were busy, without ramp and tail, where that is known.
    """
    return stage_table(stages, _FIGURES)


def stage_table(stages: Sequence[StageResult], figures: Sequence[StageFigure]) -> str:
    """A table of these figures of the stages. Figures that no stage has are left out. Empty without stages."""
    columns = [(name, [figure(stage) for stage in stages]) for name, figure in figures]
    known = [(name, cells) for name, cells in columns if any(cell != format_number(None) for cell in cells)]
    labels = [_column_label(stage) for stage in stages]
    if len(stages) <= MAX_STAGE_COLUMNS:
        return html_table(["", *labels], [[name, *cells] for name, cells in known])
    rows = [[escape_text(label), *(cells[index] for _name, cells in known)] for index, label in enumerate(labels)]
    return html_table(["stage", *(name for name, _cells in known)], rows)


def latency_table(stages: Sequence[StageResult]) -> str:
    """The table of latencies, for each kind of latency that has values in a stage. For a single stage, a row is a kind
    of latency."""
    names = ["ms", *(name for name, _figure in _SAMPLE_FIGURES)]
    if len(stages) == 1:
        samples = [(_latency_title(name, stages), sample_of(stages[0])) for name, sample_of in _LATENCIES]
        rows = [[name, *(figure(sample) for _, figure in _SAMPLE_FIGURES)] for name, sample in samples if sample.n]
        return html_table(names, rows)
    if len(stages) <= MAX_STAGE_COLUMNS:
        return html_table(["ms", *map(_column_label, stages)], _latency_rows(stages))
    rows = []
    for name, sample_of in _LATENCIES:
        measured = [stage for stage in stages if sample_of(stage).n]
        if measured:
            rows.append([_latency_title(name, measured)])
        rows += [
            [escape_text(_column_label(stage)), *(figure(sample_of(stage)) for _name, figure in _SAMPLE_FIGURES)]
            for stage in measured
        ]
    return html_table(names, rows)


def _latency_rows(stages: Sequence[StageResult]) -> list[list[str]]:
    """A group of rows for each kind of latency, a column for each stage."""
    rows: list[list[str]] = []
    for name, sample_of in _LATENCIES:
        samples = [sample_of(stage) for stage in stages]
        if not any(sample.n for sample in samples):
            continue
        rows.append([_latency_title(name, stages)])
        for figure_name, figure in _SAMPLE_FIGURES:
            cells = [figure(sample) for sample in samples]
            if any(cell != format_number(None) for cell in cells):  # no sample is large enough for a p99
                rows.append([figure_name, *cells])
    return rows


def _latency_title(name: str, stages: Sequence[StageResult]) -> str:
    """The name of a latency; for the TPOT with the clock from which it comes, or the clocks if they differ."""
    if name != "TPOT":
        return name
    sources = {stage.coverage.tpot_source for stage in stages if stage.coverage is not None}
    known = sorted(str(source) for source in sources if source is not None)
    return f"{name} ({', '.join(known)})" if known else name


def _column_label(stage: StageResult) -> str:
    """The stage's label, marked if the stage is partial."""
    return f"{stage_label(stage)} (partial)" if stage.partial else stage_label(stage)
