"""`gpumesh explain CODE`: says what the code of a finding or an error means, and what to do."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.errors import UsageError

MAX_TEXT_WIDTH = 100  # characters; longer lines are hard to read

app = new_app()


def complete_codes(incomplete: str) -> list[str]:
    """The codes that begin with ``incomplete``, for the completion of the shell."""
    from gpumesh.audit.catalog import CATALOG

    return [code for code in CATALOG if code.startswith(incomplete)]


@app.command()
def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="[CODE]", autocompletion=complete_codes, show_default=False)
    ] = None,
) -> None:
    """What a finding or an error code means, and what to do. Without a code: all of them, a line each."""
    from gpumesh.audit.catalog import CATALOG
    from gpumesh.audit.catalog import explain as find_entry

    if code is None:
        width = max(map(len, CATALOG))
        for name, listed_entry in CATALOG.items():
            typer.echo(f"{name:<{width}}  {listed_entry.title}")
        return
    entry = find_entry(code)
    if entry is None:
        from difflib import get_close_matches

        similar_codes = get_close_matches(code.lower(), CATALOG, 3)
        hint = f"did you mean {', '.join(similar_codes)}?" if similar_codes else "`gpumesh explain` lists all codes"
        raise UsageError(f"there is no code {code!r}", hint=hint)
    typer.echo(f"{entry.code} ({entry.severity}): {entry.title}\n")
    for paragraph in (entry.meaning, f"What to do: {entry.remedy}"):
        typer.echo(_wrap(paragraph))


def _wrap(paragraph: str) -> str:
    """The paragraph, wrapped to a readable width for a terminal, and unchanged for a program that reads lines."""
    if not sys.stdout.isatty():
        return paragraph
    width = max(min(shutil.get_terminal_size().columns, MAX_TEXT_WIDTH), 20)  # some terminals report a width of 0
    return textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
