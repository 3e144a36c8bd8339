"""Prints the comparison of two results, and the list of results."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import typer

from gpumesh.bench.comparison.compare import Basis, Comparison, Difference, DifferenceVerdict
from gpumesh.bench.comparison.gate import GateDecision
from gpumesh.bench.comparison.verdict_text import change_text, interval_text, summary_sentence
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.listing import ListedResult
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import Cell, Column, print_fitted_table

VERDICT_STYLES = {
    DifferenceVerdict.BETTER: "green",
    DifferenceVerdict.WORSE: "red",
    DifferenceVerdict.SAME: "dim",
    DifferenceVerdict.UNKNOWN: "dim",
}
VERDICT_TEXTS = {DifferenceVerdict.SAME: "no clear difference", DifferenceVerdict.UNKNOWN: "too few to tell"}
# The second argument is the rank: columns with a low rank get their place first.
COMPARISON_COLUMNS = (
    Column("STAGE", min_width=6),
    Column("FIGURE", min_width=14),
    Column("A", 2, right=True),
    Column("B", 2, right=True),
    Column("CHANGE", 0, right=True),
    Column("INTERVAL", 3, right=True),
    Column("VERDICT", 0),
)
LIST_COLUMNS = (
    Column("RESULT", min_width=20),
    Column("WHEN", 2),
    Column("SCENARIO", 1),
    Column("MODEL", 1, min_width=8),
    Column("NODES", 3, min_width=8),
    Column("RUNS", 4, right=True),
    Column("TOK/S", 1, right=True),
)


def print_comparison(comparison: Comparison, *, notes: bool) -> None:
    """Prints the differences between the results A and B, and how many figures differ, to stdout. With ``notes``,
    prints to stderr what may explain the differences, and which stages only one result has."""
    print_fitted_table(COMPARISON_COLUMNS, map(_difference_cells, comparison.differences))
    typer.echo(summary_sentence(comparison))
    if not notes:
        return
    if comparison.basis is Basis.BETWEEN_RUNS:
        typer.echo(f"note: by the spread between {comparison.runs_a} runs of A and {comparison.runs_b} of B", err=True)
    only_in_a = [f"only in A: {name}" for name in comparison.only_a]
    only_in_b = [f"only in B: {name}" for name in comparison.only_b]
    for line in (*comparison.unlike, *comparison.caveats, *only_in_a, *only_in_b):
        typer.echo(f"note: {clean_line(line)}", err=True)


def _difference_cells(difference: Difference) -> list[Cell | str]:
    """The row of one figure: a cell for each of ``COMPARISON_COLUMNS``."""
    verdict = difference.verdict
    return [
        difference.stage,
        f"{difference.figure} ({difference.unit})" if difference.unit == "ms" else difference.figure,
        format_number(difference.a),
        format_number(difference.b),
        change_text(difference),
        interval_text(difference),
        Cell(VERDICT_TEXTS.get(verdict, verdict.value), VERDICT_STYLES[verdict]),
    ]


def print_gate(decision: GateDecision, limit: float, *, notes: bool) -> None:
    """Prints the figures that are worse by more than the limit to stderr; with ``notes`` also those that may be."""
    for failure in decision.failures:
        typer.echo(f"gate: {clean_line(failure)}", err=True)
    if not notes:
        return
    if decision.undecided:
        count = len(decision.undecided)
        noun = "1 figure" if count == 1 else f"{count} figures"
        typer.echo(
            f"note: {noun} may be worse by more than {limit * 100:g} %, but it is not sure "
            "(--json names them; more runs or requests would tell)",
            err=True,
        )


def print_results(rows: Sequence[ListedResult], *, wide: bool) -> None:
    """Prints the list of results to stdout."""
    print_fitted_table(LIST_COLUMNS, map(_result_cells, rows), wide=wide)


def _result_cells(row: ListedResult) -> list[Cell | str]:
    """The row of a result: a cell for each of ``LIST_COLUMNS``."""
    mark = " (partial)" if row.partial else ""
    return [
        row.name + mark,
        _format_time(row.at),
        row.scenario.value,
        row.model,
        ", ".join(row.nodes),
        str(row.runs),
        format_number(row.tokens_per_s),
    ]


def _format_time(at: datetime) -> str:
    """The moment in the local time of this machine."""
    return f"{at.astimezone():%Y-%m-%d %H:%M}"
