"""Draws the whole of `status`: a line about the mesh, the table of nodes and GPUs, the lines of the pool and of the
gateways, the remarks.

The table has as many columns as there is room for. Text from hosts is cleaned and reaches rich as ``Text``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.findings import make_notes_table
from gpumesh.cli.views.local_access import access_lines
from gpumesh.cli.views.page_path import page_note
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.status.columns import status_table
from gpumesh.cli.views.status.gateways import gateways_line, gateways_table
from gpumesh.cli.views.status.pool_line import pool_line
from gpumesh.cli.views.status.processes import process_views
from gpumesh.cli.views.status.remarks import fit_remarks, list_remarks
from gpumesh.cli.views.status.rows import fit_rows, make_rows
from gpumesh.cli.views.status.scheduling import scheduling_views
from gpumesh.mesh.history import History
from gpumesh.state import GatewayPhase, MeshState

MIN_WIDTH_OF_REMARKS = 20  # characters; on a narrower terminal a remark could not be read
LINES_AROUND_ROWS = 4  # the mesh, the head of the table (two lines), the pool; one more for the gateways


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """Options of the view.

    - ``verbose``: also show the processes, what was learned and forecast, and who on this machine can use the gateway
      and the tunnels.
    - ``height``: the lines of a screen that cannot scroll; rows that do not fit are left out (``fit_rows``). ``None``:
      all rows are shown.
    - ``selected``: the name of the selected node.
    - ``history``: the utilization of the GPUs in the last minute.
    - ``wide``: all columns are shown, however narrow the terminal is.
    """

    verbose: bool = False
    height: int | None = None
    selected: str | None = None
    history: History = field(default_factory=History)
    wide: bool = False


def print_status(state: MeshState, options: ViewOptions | None = None) -> None:
    """Prints the view to stdout."""
    options = options or ViewOptions()
    out = console(wide=options.wide)
    print_plain(out, status_view(state, out.width, options))


def status_view(state: MeshState, width: int, options: ViewOptions) -> RenderableType:
    """The whole view for a terminal of ``width`` characters."""
    remarks = list_remarks(state) if width >= MIN_WIDTH_OF_REMARKS else []
    rows = make_rows(state, selected=options.selected, history=options.history)
    gateways = None if options.verbose else gateways_line(state, width)  # with ``verbose`` there is a table of them
    hidden_rows = 0
    hidden_remarks = 0
    if options.height is not None:
        # The remarks get only the lines that the rows leave free.
        lines_around_rows = LINES_AROUND_ROWS + (gateways is not None)
        free_lines = options.height - lines_around_rows - len(rows)
        if free_lines >= 1:
            remarks = fit_remarks(remarks, width, free_lines)
        else:
            remarks, hidden_remarks = [], len(remarks)  # the line of the pool counts them
        if free_lines < 0:
            room = options.height - lines_around_rows - 1  # without the line that counts the hidden rows
            rows, hidden_rows = fit_rows(rows, max(room, 1), options.selected)
    parts: list[RenderableType] = [_mesh_line(state, width), status_table(rows, width)]
    if hidden_rows:
        parts.append(Text(f"… and {hidden_rows} more rows", style="dim"))
    parts.append(pool_line(state, width, hidden_remarks))
    if gateways is not None:
        parts.append(gateways)
    if options.verbose:
        parts.extend(gateways_table(state))
        parts.extend(process_views(state))
        parts.extend(scheduling_views(state))
        parts.extend(Text(line, style="dim") for line in access_lines(state))
    if remarks:
        parts.append(make_notes_table(remarks))
    return Group(*parts)


def _mesh_line(state: MeshState, width: int) -> Text:
    """The mesh's name, the gateway's address and state, whether hosts are simulated, and, on a terminal of at least 80
    characters, the time of the state. If there is room for it, the path of the gateway's page too."""
    line = Text(clean_line(state.mesh, 30), style="bold", no_wrap=True, overflow="ellipsis")
    gateway = state.gateway
    if gateway.url is not None:
        line.append(f"  {clean_line(gateway.url)} {gateway.state}", style="not bold cyan")
    rest = Text()
    if any(node.simulated for node in state.nodes):
        rest.append("  simulated hosts", style="not bold yellow")
    if width >= 80:
        rest.append(f"  {state.at.astimezone():%H:%M:%S}", style="not bold dim")
    note = page_note(gateway.url or "") if gateway.state is GatewayPhase.SERVING else ""
    if line.cell_len + len(note) + rest.cell_len <= width:
        line.append(note, style="not bold cyan")
    return line.append_text(rest)
