"""`gpumesh usage`: who used what, by key, model, node or day; also when no mesh runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option, print_json
from gpumesh.errors import ConfigError, GPUMeshError, UsageError

if TYPE_CHECKING:
    from gpumesh.gateway.usage.counts import UsageCounts
    from gpumesh.gateway.usage.report import Grouping, KeyBudget, UsageReport
    from gpumesh.topology import Topology

app = new_app()

NO_KEY = "(no key)"  # in tables
MIN_NAME_WIDTH = 16  # of a column with names, in characters


@app.command()
def usage(
    ctx: typer.Context,
    by: Annotated[
        list[str] | None, typer.Option("--by", metavar="key|model|node|day", help="What to sum by; may be repeated.")
    ] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="DAYS|DATE", help="30d: 30 days with today, or 2026-11-01; in UTC.")
    ] = "30d",
    as_json: Annotated[bool, json_option("As JSON of the schema gpumesh.usage/1.")] = False,
) -> None:
    """Who used what: requests, tokens, GPU time and energy of what the mesh has answered.

    Reads what the mesh of this mesh.yaml has counted, also when it does not run.

    \b
    Examples:
      gpumesh usage
      gpumesh usage --by model --since 7d
      gpumesh usage --by day --by key --json | jq '.rows[]'
    """
    import sqlite3

    from gpumesh.gateway.usage.report import Grouping, parse_since, read_report, report_json

    options = global_options(ctx)
    now = datetime.now(UTC)
    try:
        groupings = [Grouping(word) for word in by or [Grouping.KEY]]
    except ValueError:
        raise UsageError(f"--by is one of: {', '.join(Grouping)}") from None
    try:
        first_day = parse_since(since, now)
    except ValueError as error:
        raise UsageError(f"--since {since!r} {error}") from None
    path, topology = options.paths().usage, _read_topology(options)
    keys = () if topology is None else topology.gateway.keys
    try:
        report = read_report(path, by=groupings, since=first_day, keys=keys, now=now)
    except (sqlite3.Error, OSError) as error:
        raise GPUMeshError(f"usage cannot be read from {path}: {error}") from None
    if as_json:
        print_json(report_json(report, "" if topology is None else topology.name))
    elif not report.lines:
        if not options.quiet:
            typer.echo(f"nothing was used since {first_day}: the mesh of this mesh.yaml has answered nothing", err=True)
    else:
        _print_report(report)


def _read_topology(options: GlobalOptions) -> Topology | None:
    """The content of mesh.yaml, for its name and its keys; ``None`` if it cannot be read now: what was used does not
    depend on it."""
    try:
        return options.topology()
    except ConfigError:
        return None


def _print_report(report: UsageReport) -> None:
    """Prints the table, with a line for the total if there are several lines, and then the budgets."""
    from gpumesh.cli.views.console import console
    from gpumesh.cli.views.tables import Cell, Column, print_fitted_table
    from gpumesh.gateway.usage.report import Grouping

    budgets = {budget.key: budget for budget in report.budgets} if report.by == (Grouping.KEY,) else {}
    columns = [
        Column(name.upper(), 0 if number == 0 else 1, min_width=MIN_NAME_WIDTH) for number, name in enumerate(report.by)
    ]
    columns += [
        Column("REQUESTS", 1, right=True),
        Column("FAILED", 5, right=True),
        Column("CANCELLED", 6, right=True),
        Column("PROMPT", 3, right=True),
        Column("OUTPUT", 3, right=True),
        Column("TOKENS", 0, right=True),
        Column("GPU TIME", 2, right=True),
        Column("ENERGY", 4, right=True),
        Column("THIS MONTH", 3),
    ]
    rows: list[list[Cell | str]] = [
        [*_name_cells(report.by, line.values), *_count_cells(line.counts), _budget_cell(budgets, line.values[0])]
        for line in report.lines
    ]
    if len(rows) > 1:
        names = ["total", *("" for _ in report.by[1:])]
        rows.append([Cell(text, "bold") for text in (*names, *_count_cells(report.total), "")])
    print_fitted_table(columns, rows)
    estimated = report.total.estimated
    if estimated:
        console(stderr=True).print(
            f"the tokens of {estimated} of {report.total.requests} requests are estimated: the servers gave no counts",
            style="dim",
            soft_wrap=True,
        )


def _name_cells(by: tuple[Grouping, ...], values: tuple[str, ...]) -> list[str]:
    return [value or (NO_KEY if name == "key" else "other") for name, value in zip(by, values, strict=True)]


def _count_cells(counts: UsageCounts) -> list[str]:
    """The cells of a table's row: requests, tokens, GPU time and energy."""
    from gpumesh.cli.views.figures import UNKNOWN

    tokens = counts.prompt_tokens + counts.answer_tokens
    return [
        f"{counts.requests:,}",
        f"{counts.failed:,}" if counts.failed else "",
        f"{counts.cancelled:,}" if counts.cancelled else "",
        f"{counts.prompt_tokens:,}",
        f"{counts.answer_tokens:,}",
        f"{tokens:,}",
        format_gpu_time(counts.gpu_s),
        format_energy(counts.energy_j) if counts.energy_j else UNKNOWN,
    ]


def _budget_cell(budgets: Mapping[str, KeyBudget], key: str) -> str:
    """How much of its budget a key has used in this month of the calendar."""
    budget = budgets.get(key)
    if budget is None or budget.tokens_per_month is None:
        return ""
    return f"{100.0 * budget.used_tokens / budget.tokens_per_month:.0f} % of {budget.tokens_per_month:,}"


def format_gpu_time(seconds: float) -> str:
    """A sum of GPU seconds: ``12.3 s``, ``45 min``, ``120.5 h``."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def format_energy(joules: float) -> str:
    """An energy: ``0.5 Wh``, ``340 Wh``, ``1.2 kWh``."""
    watt_hours = joules / 3600.0
    if watt_hours < 1000:
        return f"{watt_hours:.2g} Wh" if watt_hours < 10 else f"{watt_hours:.0f} Wh"
    return f"{watt_hours / 1000:,.1f} kWh"
