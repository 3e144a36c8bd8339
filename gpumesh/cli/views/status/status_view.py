"""The whole of `status`: a line about the mesh, the table of nodes and GPUs, the pool in one line, and the remarks.

The table has as many columns as there is room for. Text from hosts is cleaned and reaches rich as ``Text``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.findings import make_notes_table
from gpumesh.cli.views.local_access import access_lines
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.status.columns import status_table
from gpumesh.cli.views.status.pool_line import pool_line
from gpumesh.cli.views.status.processes import process_views
from gpumesh.cli.views.status.remarks import fit_remarks, list_remarks
from gpumesh.cli.views.status.rows import fit_rows, make_rows
from gpumesh.mesh.history import History
from gpumesh.state import MeshState

MIN_WIDTH_OF_REMARKS = 20
LINES_AROUND_ROWS = 5  # the mesh, the head of the table (two lines), the number of hidden rows, the pool
MIN_REMARK_LINES = 2


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """Options of the view. ``height``: the lines of a screen that cannot scroll; rows that do not fit are left out
    (``fit_rows``)."""

    verbose: bool = False
    height: int | None = None
    selected: str | None = None
    history: History = field(default_factory=History)


def print_status(state: MeshState, options: ViewOptions | None = None) -> None:
    out = console()
    print_plain(out, status_view(state, out.width, options or ViewOptions()))


def status_view(state: MeshState, width: int, options: ViewOptions) -> RenderableType:
    remarks = list_remarks(state) if width >= MIN_WIDTH_OF_REMARKS else []
    rows = make_rows(state, selected=options.selected, history=options.history)
    left_out = 0
    if options.height is not None:
        # The remarks get the lines that the rows leave free, or a third of the screen if the rows leave less.
        free_lines = options.height - len(rows) - LINES_AROUND_ROWS
        remarks, remark_lines = fit_remarks(remarks, width, max(free_lines, options.height // 3, MIN_REMARK_LINES))
        # One line of the screen stays empty.
        room = options.height - remark_lines - LINES_AROUND_ROWS - 1
        rows, left_out = fit_rows(rows, max(room, 1), options.selected)
    parts: list[RenderableType] = [_mesh_line(state, width), status_table(rows, width)]
    if left_out:
        parts.append(Text(f"… and {left_out} more rows", style="dim"))
    parts.append(pool_line(state, width))
    if options.verbose:
        parts.extend(process_views(state))
        parts.extend(Text(line, style="dim") for line in access_lines(state))
    if remarks:
        parts.append(make_notes_table(remarks))
    return Group(*parts)


def _mesh_line(state: MeshState, width: int) -> Text:
    line = Text(clean_line(state.mesh, 30), style="bold", no_wrap=True, overflow="ellipsis")
    gateway = state.gateway
    if gateway.url is not None:
        line.append(f"  {clean_line(gateway.url)} {gateway.state}", style="not bold cyan")
    if any(node.simulated for node in state.nodes):
        line.append("  simulated hosts", style="not bold yellow")
    if width >= 80:
        line.append(f"  {state.at.astimezone():%H:%M:%S}", style="not bold dim")
    return line
