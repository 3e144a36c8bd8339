"""Draws the view of status for its tests."""

from __future__ import annotations

import io

from rich.console import Console

from gpumesh.cli.views.console import render_lines
from gpumesh.cli.views.status.status_view import ViewOptions, status_view
from gpumesh.state import (
    MeshState,
)


def draw_lines(state: MeshState, width: int, options: ViewOptions | None = None) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    return render_lines(out, status_view(state, width, options or ViewOptions()))


def draw_text(state: MeshState, width: int = 200, options: ViewOptions | None = None) -> str:
    return "\n".join(draw_lines(state, width, options))


def row_of(node: str, state: MeshState, width: int = 200) -> str:
    return next(line for line in draw_lines(state, width)[3:] if line[2:].startswith(f"{node} "))
