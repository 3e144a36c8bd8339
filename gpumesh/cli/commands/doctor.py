"""`gpumesh doctor`: one report to paste into a question or an issue. It holds no secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.output_format import DocumentFormat, choose_format, output_option, print_document
from gpumesh.cli.views.safe_text import clean_line, clean_text

app = new_app()


@app.command()
def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, json_option()] = False,
    output: Annotated[DocumentFormat | None, output_option(DocumentFormat)] = None,
) -> None:
    """One report to paste into a question: versions, paths, configuration, the running mesh, limits, last warnings.

    It has no passwords and no keys. It has the names and addresses of hosts: look at it before you paste it. The exit
    code is 0 whatever it says; `gpumesh status --check` judges.
    """
    from gpumesh.cli.doctor.report import make_report

    options = global_options(ctx)
    chosen_format = choose_format(output, as_json)
    report = make_report(options)
    if chosen_format is not None:
        print_document({"schema": "gpumesh.doctor/1", **report}, chosen_format)
        return
    typer.echo("\n".join(_lines(report)))
    if not options.quiet:
        typer.echo("names and addresses of hosts are in it: look at it before you paste it", err=True)


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the report: a section's name, then a line for each of its entries."""
    for number, (title, section) in enumerate(report.items()):
        if number:
            yield ""
        yield title
        width = max((len(name) for name in section), default=0)
        for name, value in section.items():
            values = value if isinstance(value, list) else [value]
            label = f"  {clean_line(name.replace('_', ' ')):<{width}}  "
            if not values:
                yield f"{label}none"
            for text in values:
                for line in clean_text(str(text)).split("\n"):
                    yield label + clean_line(line)
                    label = " " * len(label)
