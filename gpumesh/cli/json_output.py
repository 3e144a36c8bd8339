"""The option `--json` that commands have, and the printing of its document."""

from __future__ import annotations

from typing import Any

import typer

from gpumesh.cli.views.safe_text import json_text


def json_option(help_text: str = "As JSON.") -> Any:
    """The option for a parameter ``as_json: Annotated[bool, json_option()] = False``."""
    return typer.Option("--json", help=help_text)


def print_json(document: Any) -> None:
    """Prints the document to stdout, indented, in a form that is safe on a terminal."""
    typer.echo(json_text(document, indent=2))
