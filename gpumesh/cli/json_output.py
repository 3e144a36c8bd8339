"""The option `--json` that commands have, and the printing of its document."""

from __future__ import annotations

from typing import Any

import typer

from gpumesh.cli.views.safe_text import json_text


def json_option(help_text: str = "As JSON.") -> Any:
    """For ``as_json: Annotated[bool, json_option()] = False``."""
    return typer.Option("--json", help=help_text)


def print_json(document: Any) -> None:
    typer.echo(json_text(document, indent=2))
