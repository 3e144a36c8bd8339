"""`gpumesh explain CODE`: what a code means that stands in a finding, an error, the log or the JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from gpumesh.cli.explanations import EXPLANATIONS
from gpumesh.cli.lazy import new_app
from gpumesh.errors import UsageError

app = new_app()


def codes(incomplete: str) -> Iterable[str]:
    return [code for code in EXPLANATIONS if code.startswith(incomplete)]


@app.command()
def explain(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", autocompletion=codes, show_default=False)] = None,
) -> None:
    """What a finding or an error code means, and what to do. Without a code: all of them, a line each."""
    if code is None:
        width = max(map(len, EXPLANATIONS))
        for name, explanation in EXPLANATIONS.items():
            typer.echo(f"{name:<{width}}  {explanation.means.split('. ')[0].rstrip('.')}")
        return
    found = EXPLANATIONS.get(code.strip().lower())
    if found is None:
        from difflib import get_close_matches

        near = get_close_matches(code.lower(), EXPLANATIONS, 3)
        hint = f"did you mean {', '.join(near)}?" if near else "`gpumesh explain` lists all codes"
        raise UsageError(f"there is no code {code!r}", hint=hint)
    typer.echo(f"{code.strip().lower()}\n\n{found.means}\n\nWhat to do: {found.do}")
