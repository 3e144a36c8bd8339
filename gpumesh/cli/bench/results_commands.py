"""The commands of `bench` that work on results: `show`, `list`, `compare` and `export`. They measure nothing."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli.bench import bench_options
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option, print_json
from gpumesh.cli.output_format import OutputFormat, choose_format, output_option, print_document, print_names
from gpumesh.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from gpumesh.bench.results.listing import ListedResult
    from gpumesh.bench.results.result import BenchResult

RESULT_HELP = "A result's folder, or its name in `bench list`; else the latest."
JsonOption = Annotated[bool, json_option("As JSON (schema gpumesh.bench/1).")]


class ExportFormat(StrEnum):
    """The formats of `bench export`."""

    CSV = "csv"
    MARKDOWN = "markdown"


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to `gpumesh bench`, in the order of its help."""
    app.command()(show)
    app.command("list")(list_results)
    app.command()(compare)
    app.command()(export)


def show(
    ctx: typer.Context,
    path: Annotated[Path | None, typer.Argument(metavar="[RESULT]", help=RESULT_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a result again."""
    from gpumesh.bench.results.result import result_json
    from gpumesh.cli.views import bench_tables

    result = _read_named_result(path)
    if as_json:
        print_json(result_json(result))
        return
    bench_tables.print_result(result, notes=not global_options(ctx).quiet)


def list_results(
    ctx: typer.Context,
    as_json: Annotated[bool, json_option()] = False,
    output: Annotated[OutputFormat | None, output_option()] = None,
) -> None:
    """List the results, the latest first.

    These are the results that `bench run` has written without --out. TOK/S is the highest output rate of the mesh.
    """
    from gpumesh.bench.result_folder import find_results
    from gpumesh.cli.bench.comparison_table import print_results
    from gpumesh.wire import to_json

    chosen_format = choose_format(output, as_json)
    rows, problems = _list_folders(find_results(bench_options.results_folder()))
    if chosen_format == OutputFormat.NAME:
        print_names(row.name for row in rows)
    elif chosen_format in (None, OutputFormat.WIDE):
        if rows:
            print_results(rows, wide=chosen_format == OutputFormat.WIDE)
    else:
        print_document({"schema": "gpumesh.bench-list/1", "results": to_json(rows)}, chosen_format)
    if not global_options(ctx).quiet:
        if not rows:
            typer.echo("nothing was measured yet: `gpumesh bench run` does it", err=True)
        for problem in problems:
            typer.echo(f"note: {problem}", err=True)


def _list_folders(folders: list[Path]) -> tuple[list[ListedResult], list[str]]:
    """The results in these folders, the latest first; and a sentence for each that cannot be read."""
    from gpumesh.bench.result_folder import read_result
    from gpumesh.bench.results.listing import list_result
    from gpumesh.cli.views.safe_text import clean_line

    rows: list[ListedResult] = []
    problems: list[str] = []
    for folder in folders:
        try:
            rows.append(list_result(folder.name, read_result(folder)))
        except UsageError as error:  # one result that is broken must not hide the others
            problems.append(clean_line(error.message))
    return sorted(rows, key=lambda row: row.at, reverse=True), problems


def compare(
    ctx: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="A result: the one before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="A result: the one after.")],
    gate: Annotated[
        str | None,
        typer.Option(metavar="5%", help="Exit with 1 if a figure is surely worse by more than this. For CI."),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots (HTML).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare unlike results too.")] = False,
    as_json: Annotated[bool, json_option("As JSON (schema gpumesh.bench-compare/1).")] = False,
) -> None:
    """Compare two results: what is better or worse.

    Results of several runs (`bench run --repeat 6`) are judged by the spread between their runs; single runs only by
    the spread within them. Results of other models, lengths, loads, nodes, drivers or versions are not compared.

    \b
    Examples:
      gpumesh bench run --repeat 6 -n 40 --out before
      gpumesh bench run --repeat 6 -n 40 --out after
      gpumesh bench compare before after
      gpumesh bench compare before after --gate 5% --report comparison.html
    """
    from gpumesh.bench.comparison.compare import compare as compare_results
    from gpumesh.bench.comparison.gate import check_gate
    from gpumesh.bench.report.comparison_report import comparison_html
    from gpumesh.cli.bench.comparison_table import print_comparison, print_gate
    from gpumesh.wire import to_json

    limit = _parse_gate(gate)
    result_a, result_b = _read_named_result(a), _read_named_result(b)
    comparison = compare_results(result_a, result_b)
    if comparison.unlike and not force:
        reasons = "; ".join(comparison.unlike)
        raise UsageError(f"A and B are not alike: {reasons}", hint="--force compares them all the same")
    decision = None if limit is None else check_gate(comparison, limit)
    notes = not global_options(ctx).quiet
    if as_json:
        document = {"schema": "gpumesh.bench-compare/1", **to_json(comparison)}
        if decision is not None:
            document["gate"] = {"limit": limit, **to_json(decision)}
        print_json(document)
    else:
        print_comparison(comparison, notes=notes)
    if report is not None:
        failures = () if decision is None else decision.failures
        _write_report(report, comparison_html(comparison, result_a, result_b, gate=failures))
    if decision is not None and limit is not None:
        print_gate(decision, limit, notes=notes)
        if decision.failures:
            raise typer.Exit(int(ExitCode.FAILED))


def _parse_gate(text: str | None) -> float | None:
    """The limit of the gate as a share. Raises UsageError for a text that is none."""
    from gpumesh.bench.comparison.gate import parse_limit

    try:
        return None if text is None else parse_limit(text)
    except ValueError:
        raise UsageError(f"--gate {text!r} is no percentage", hint="e.g. --gate 5%") from None


def _write_report(file: Path, page: str) -> None:
    """Writes the page. Raises UsageError when that fails."""
    from gpumesh.files import atomic_file

    try:
        atomic_file.replace(file, page, mode=0o644, sync=False)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}") from None


def export(
    path: Annotated[Path | None, typer.Argument(metavar="[RESULT]", help=RESULT_HELP)] = None,
    form: Annotated[ExportFormat, typer.Option("--format", help="csv: all figures. markdown: a table.")] = (
        ExportFormat.CSV
    ),
) -> None:
    """Print a result as CSV or as Markdown.

    \b
    Examples:
      gpumesh bench export > result.csv
      gpumesh bench export before --format markdown
    """
    from gpumesh.bench.report.export import result_csv, result_markdown

    result = _read_named_result(path)
    text = result_csv(result) if form is ExportFormat.CSV else result_markdown(result)
    typer.echo(text, nl=False)


def _read_named_result(path: Path | None) -> BenchResult:
    """The result at this path, or of this name in `bench list`; without a path the latest. Raises UsageError."""
    from gpumesh.bench.result_folder import find_newest_result, read_result

    if path is None:
        path = find_newest_result(bench_options.results_folder())
        if path is None:
            raise UsageError("nothing was measured yet", hint="`gpumesh bench run` does it")
    elif not path.exists() and len(path.parts) == 1:
        listed = bench_options.results_folder() / path
        path = listed if listed.exists() else path
    return read_result(path)
