"""Prints the servers' own times of a benchmark's result, and which clock its TPOT comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import typer

from gpumesh.bench.figures.node_shares import NodeShare
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import Cell, Column, print_fitted_table
from gpumesh.text.sentences import join_some

MAX_ROWS = 24  # with more rows, only those of the last stage are printed; all are in the report
COLUMNS = (
    Column("SERVERS' OWN TIMES", min_width=18),
    Column("SERVED", 3, right=True),
    Column("TOK/S EACH", 2, right=True),
    Column("PREFILL TOK/S", 1, right=True),
    Column("QUEUE ms", 1, right=True),
    Column("QUEUE max", 4, right=True),
    Column("LOAD ms", 1, right=True),
    Column("COLD STARTS", 5, right=True),
)


def print_server_times(result: BenchResult) -> None:
    """Prints a row for each node of each stage to stdout, which clock the TPOT comes from, and a line for each load of
    the model in the warm-up. Nothing is printed for what no server gave."""
    rows = [(stage, share) for stage in result.stages for share in stage.nodes if _has_times(share)]
    shown = rows
    if len(rows) > MAX_ROWS:
        shown = [(stage, share) for stage, share in rows if stage is rows[-1][0]][:MAX_ROWS]
    if shown:
        print_fitted_table(COLUMNS, [_cells(stage, share) for stage, share in shown])
    if len(shown) < len(rows):
        typer.echo(f"{len(shown)} of {len(rows)} rows: all are in the report")
    for line in _tpot_source_lines(result.stages):
        typer.echo(clean_line(line))
    stages = {stage.name for stage in result.stages}
    for start in result.cold_starts:
        if start.stage not in stages:  # those of other stages are in the notes
            typer.echo(clean_line(f"{start.stage}: {start.node} loaded the model in {start.load_ms / 1000.0:.1f} s"))


def _tpot_source_lines(stages: Sequence[StageResult]) -> Iterator[str]:
    """Yields which clock the TPOT comes from: one line for all stages if it is the same clock."""
    by_source: dict[str, list[str]] = {}
    for stage in stages:
        if stage.coverage is not None and stage.coverage.tpot_source is not None:
            by_source.setdefault(stage.coverage.tpot_source, []).append(stage_label(stage))
    for source, names in by_source.items():
        where = "" if len(by_source) == 1 else f" in {join_some(names, 4)}"
        yield f"TPOT{where}: {source}"


def _has_times(share: NodeShare) -> bool:
    return bool(share.wait_ms.n or share.load_ms.n or share.prefill_tokens_per_s.n or share.server_tokens_per_s)


def _cells(stage: StageResult, share: NodeShare) -> list[Cell | str]:
    """The row of a node in a stage: a cell for each of ``COLUMNS``."""
    cold = str(share.cold_starts) if share.load_ms.n else format_number(None)
    return [
        stage_label(stage) if stage.node == share.node else f"{stage_label(stage)}: {share.node}",
        str(share.served),
        format_number(share.server_tokens_per_s),
        format_number(share.prefill_tokens_per_s.p50),
        format_number(share.wait_ms.p50),
        format_number(share.wait_ms.max),
        format_number(share.load_ms.max),
        Cell(cold, "yellow" if share.cold_starts else ""),
    ]
