"""Writes a result as CSV, for a spreadsheet or a program, and as Markdown, for an issue or a wiki. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import TypeAlias

from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import Interval, SampleSummary
from gpumesh.text.printable import printable

Value: TypeAlias = str | int | float | None

# The samples and the rates of a stage, by the names of their columns.
_SAMPLES: tuple[tuple[str, Callable[[StageResult], SampleSummary]], ...] = (
    ("ttft_ms", lambda stage: stage.latency.ttft),
    ("tpot_ms", lambda stage: stage.latency.tpot),
    ("inter_token_ms", lambda stage: stage.latency.itl),
    ("end_to_end_ms", lambda stage: stage.latency.end_to_end),
    ("outside_server_ms", lambda stage: stage.latency.outside_server),
    ("server_tokens_per_s", lambda stage: stage.rates.server),
)
_RATES: tuple[tuple[str, Callable[[StageResult], float | None], Callable[[StageResult], Interval | None]], ...] = (
    (
        "loaded_tokens_per_s",
        lambda stage: stage.rates.loaded_tokens_per_s,
        lambda stage: stage.intervals.loaded_tokens_per_s,
    ),
    (
        "loaded_requests_per_s",
        lambda stage: stage.rates.loaded_requests_per_s,
        lambda stage: stage.intervals.loaded_requests_per_s,
    ),
    (
        "loaded_goodput_per_s",
        lambda stage: stage.rates.loaded_goodput_per_s,
        lambda stage: stage.intervals.loaded_goodput_per_s,
    ),
    (
        "output_tokens_per_s",
        lambda stage: stage.rates.output_tokens_per_s,
        lambda stage: stage.intervals.output_tokens_per_s,
    ),
    (
        "total_tokens_per_s",
        lambda stage: stage.rates.total_tokens_per_s,
        lambda stage: stage.intervals.total_tokens_per_s,
    ),
    ("requests_per_s", lambda stage: stage.rates.requests_per_s, lambda stage: stage.intervals.requests_per_s),
    ("goodput_per_s", lambda stage: stage.rates.goodput_per_s, lambda stage: stage.intervals.goodput_per_s),
    ("tokens_per_joule", lambda stage: stage.tokens_per_joule, lambda stage: stage.intervals.tokens_per_joule),
)


def result_csv(result: BenchResult) -> str:
    """The result as CSV (RFC 4180): a row for each stage. The column ``run`` is the number of the run.

    If the scenario was run several times, rows of ``all`` come first, with the figures of all runs together. Columns
    that end in ``_low`` and ``_high`` are the ends of 95 % intervals. An unknown value is an empty cell.
    """
    rows = [(label, stage) for label, run in _numbered_runs(result) for stage in run.stages]
    names = [name for name, _ in _csv_cells("", rows[0][1])] if rows else ["run", "stage"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for label, stage in rows:
        writer.writerow([_csv_text(value) for _, value in _csv_cells(label, stage)])
    return text.getvalue()


def _numbered_runs(result: BenchResult) -> Iterator[tuple[str, BenchResult]]:
    """The results whose stages are rows, with the text for the column ``run``."""
    if not result.runs:
        yield "1", result
        return
    yield "all", result
    for number, run in enumerate(result.runs, start=1):
        yield str(number), run


def _csv_cells(run: str, stage: StageResult) -> Iterator[tuple[str, Value]]:
    """The cells of a stage with the names of their columns."""
    yield "run", run
    yield "stage", stage.name
    yield "kind", stage.kind.value
    yield "node", stage.node
    yield "route", stage.route
    yield "in_flight", stage.concurrency
    yield "requests", stage.requests
    yield "served", stage.served
    yield "failed", stage.failed
    yield "cut", stage.cut
    yield "retried", stage.retried
    yield "prompt_tokens", stage.prompt_tokens
    yield "output_tokens", stage.output_tokens
    yield "duration_s", stage.duration_s
    for name, sample_of in _SAMPLES:
        sample = sample_of(stage)
        yield f"{name}_n", sample.n
        yield f"{name}_mean", sample.mean
        yield f"{name}_p50", sample.p50
        yield f"{name}_p50_low", sample.p50_low
        yield f"{name}_p50_high", sample.p50_high
        yield f"{name}_p90", sample.p90
        yield f"{name}_p99", sample.p99
    for name, rate_of, interval_of in _RATES:
        interval = interval_of(stage)
        yield name, rate_of(stage)
        yield f"{name}_low", None if interval is None else interval.low
        yield f"{name}_high", None if interval is None else interval.high
    yield "power_w", None if stage.gpu is None else stage.gpu.power_w


def _csv_text(value: Value) -> str | int | float | None:
    """A value for a cell. Numbers are rounded to six significant digits.

    A text that a spreadsheet would take for a formula gets an apostrophe (OWASP, "CSV Injection").
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value


_MARKDOWN_COLUMNS = (
    "stage",
    "in flight",
    "served",
    "failed",
    "TTFT ms",
    "TPOT ms",
    "end-to-end ms",
    "tok/s",
    "req/s",
    "goodput",
)


def result_markdown(result: BenchResult) -> str:
    """The result as a Markdown table of medians and rates with 95 % intervals, then the nodes and the notes."""
    settings, environment = result.settings, result.environment
    runs = f", {len(result.runs)} runs" if result.runs else ""
    lines = [
        f"**gpumesh bench: {_escape(result.scenario)} of {_escape(settings.model)}** "
        f"({result.at:%Y-%m-%d %H:%M} UTC{runs})",
        "",
        f"{settings.tokens} tokens to answer, prompts of about {settings.prompt_tokens}; "
        f"good: TTFT ≤ {result.objective.ttft_ms:g} ms and TPOT ≤ {result.objective.tpot_ms:g} ms; "
        f"gpumesh {_escape(environment.gpumesh)}",
        "",
        f"| {' | '.join(_MARKDOWN_COLUMNS)} |",
        f"|---|{'---:|' * (len(_MARKDOWN_COLUMNS) - 1)}",
        *(f"| {' | '.join(_markdown_cells(stage))} |" for stage in result.stages),
        "",
    ]
    for node in environment.nodes:
        gpus = "GPUs unknown" if node.gpus is None else ", ".join(node.gpus) or "no GPU"
        simulated = ", simulated" if node.simulated else ""
        lines.append(
            f"- {_escape(node.name)}: {_escape(gpus)}; {_escape(node.backend)} {_escape(node.version or '')}{simulated}"
        )
    lines += [f"- note: {_escape(note)}" for note in result.notes]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_cells(stage: StageResult) -> Iterator[str]:
    """The row of a stage. The rates are those while all slots were busy, if there was such a part."""
    rates, intervals = stage.rates, stage.intervals
    is_loaded = rates.loaded_tokens_per_s is not None
    yield _escape(stage_label(stage))
    yield "open" if stage.concurrency is None else str(stage.concurrency)
    yield str(stage.served)
    yield str(stage.failed + stage.cut)
    for sample in (stage.latency.ttft, stage.latency.tpot, stage.latency.end_to_end):
        yield _with_interval(sample.p50, sample.p50_low, sample.p50_high)
    for value, interval in (
        (rates.best_tokens_per_s, intervals.loaded_tokens_per_s if is_loaded else intervals.output_tokens_per_s),
        (rates.best_requests_per_s, intervals.loaded_requests_per_s if is_loaded else intervals.requests_per_s),
        (rates.best_goodput_per_s, intervals.loaded_goodput_per_s if is_loaded else intervals.goodput_per_s),
    ):
        low, high = (None, None) if interval is None else (interval.low, interval.high)
        yield _with_interval(value, low, high)


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """``12.3 (11.9-12.8)``, or the value alone if it has no interval."""
    if value is None or low is None or high is None:
        return format_number(value)
    return f"{format_number(value)} ({format_number(low)}–{format_number(high)})"  # noqa: RUF001  # the dash of ranges


def _escape(text: str) -> str:
    """A text that cannot become markup: it may come from a host."""
    return "".join(
        f"\\{character}" if character in "\\`*_{}[]<>()#+!|~" else character for character in printable(text)
    )
