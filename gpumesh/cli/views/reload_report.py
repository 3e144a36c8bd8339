"""Prints what a reload of mesh.yaml has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from gpumesh.cli.views.safe_text import clean_line

if TYPE_CHECKING:
    from gpumesh.config.live_changes import ReloadReport


def print_report(report: ReloadReport) -> None:
    """Prints a line for each node, model and key that has changed."""
    if report.age_s:
        typer.echo(f"the mesh took the file over by itself, {report.age_s:.0f} s ago:")
    for line in report.lines():
        typer.echo(clean_line(line))
