"""The option `-o FORMAT` of commands that show something: JSON, YAML, a table of all columns, or names alone."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import typer

from gpumesh.cli.json_output import print_json
from gpumesh.errors import UsageError


class OutputFormat(StrEnum):
    """The formats of a command whose usual output is a table."""

    JSON = "json"
    YAML = "yaml"
    WIDE = "wide"  # the table with all columns, however narrow the terminal is
    NAME = "name"  # the names alone, one a line


class DocumentFormat(StrEnum):
    """The formats of a command whose usual output is no table."""

    JSON = "json"
    YAML = "yaml"


def output_option(formats: type[StrEnum] = OutputFormat) -> Any:
    """The option for a parameter ``output: Annotated[OutputFormat | None, output_option()] = None``."""
    return typer.Option("--output", "-o", metavar="FORMAT", help=f"One of {', '.join(formats)}.")


def choose_format(output: StrEnum | None, as_json: bool) -> str | None:
    """The format that ``-o`` and ``--json`` ask for together; ``None``: the usual one. Raises UsageError if they
    contradict each other."""
    if as_json and output not in (None, OutputFormat.JSON):
        raise UsageError(f"--json and -o {output} contradict each other", hint="write one of them")
    return OutputFormat.JSON if as_json else output


def print_document(document: Any, output: str) -> None:
    """Prints the document as JSON or YAML."""
    if output == OutputFormat.YAML:
        from gpumesh.config.yaml_output import dump_yaml

        typer.echo(dump_yaml(document), nl=False)
    else:
        print_json(document)


def print_names(names: Iterable[str]) -> None:
    """Prints a line for each name. A name may come from a host."""
    from gpumesh.cli.views.safe_text import clean_line

    for name in names:
        typer.echo(clean_line(name))
