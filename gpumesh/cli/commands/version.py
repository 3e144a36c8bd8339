"""`gpumesh version`: the version of gpumesh, and of what it runs on."""

from __future__ import annotations

from typing import Annotated

import typer

from gpumesh import __version__
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.output_format import DocumentFormat, choose_format, output_option, print_document

app = new_app()


@app.command()
def version(
    ctx: typer.Context,
    as_json: Annotated[bool, json_option()] = False,
    output: Annotated[DocumentFormat | None, output_option(DocumentFormat)] = None,
) -> None:
    """The version of gpumesh; with -v, -o or --json also of Python and the system. More is in `gpumesh doctor`."""
    import platform

    versions = {"gpumesh": __version__, "python": platform.python_version(), "system": platform.platform()}
    chosen_format = choose_format(output, as_json)
    if chosen_format is not None:
        print_document({"schema": "gpumesh.version/1", **versions}, chosen_format)
        return
    typer.echo(f"gpumesh {__version__}")
    if global_options(ctx).verbose:
        typer.echo(f"Python {versions['python']}\n{versions['system']}")
