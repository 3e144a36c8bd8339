"""Draws the gateways that share the nodes of the mesh: a line below the status table, and a table with `status -v`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import RenderableType
from rich.text import Text

from gpumesh.cli.views.figures import format_duration, shorten
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import new_table
from gpumesh.state import MeshGatewayState, MeshState

MAX_HOST_CHARS = 24
MAX_VERSION_CHARS = 20


def gateways_line(state: MeshState, width: int) -> Text | None:
    """All gateways with their requests, in one line of at most ``width`` characters; ``None`` if there are no others.
    Where there is no room for a gateway, it is only counted."""
    gateways = state.gateways
    if len(gateways) < 2:
        return None
    hosts = Counter(gateway.host for gateway in gateways)
    texts = [_describe(gateway, with_pid=hosts[gateway.host] > 1) for gateway in gateways]
    line = f"{len(gateways)} gateways"
    for count, text in enumerate(texts):
        longer_line = f"{line}{' · ' if count else ': '}{text}"
        rest = len(texts) - count - 1
        ending = f" · {rest} more" if rest else ""
        if cell_len(longer_line + ending) > width:
            line = f"{line} · {rest + 1} more" if count else line
            break
        line = longer_line
    return Text(shorten(line, width), style="dim", no_wrap=True)


def _describe(gateway: MeshGatewayState, *, with_pid: bool) -> str:
    """A gateway and its requests. ``with_pid``: another gateway runs on the same machine."""
    pid = f" pid {gateway.pid}" if with_pid else ""
    queued = f", {gateway.queued} queued" if gateway.queued else ""
    name = clean_line(gateway.host, MAX_HOST_CHARS)
    return f"{name}{pid}{' (this one)' if gateway.own else ''}: {gateway.in_flight} in flight{queued}"


def gateways_table(state: MeshState) -> Iterator[RenderableType]:
    """Yields the table of all gateways; nothing if the mesh shares its nodes with no others."""
    if not state.gateways:
        return
    table = new_table()
    for title in ("GATEWAY", "PID", "VERSION", "SINCE", "IN FLIGHT", "QUEUED", ""):
        is_number = title in ("PID", "SINCE", "IN FLIGHT", "QUEUED")
        table.add_column(title, no_wrap=True, overflow="ellipsis", justify="right" if is_number else "left")
    for gateway in state.gateways:
        age_s = max((state.at - gateway.since).total_seconds(), 0.0)  # the clock of its machine may be ahead
        cells = (
            clean_line(gateway.host, MAX_HOST_CHARS),
            str(gateway.pid),
            clean_line(gateway.version, MAX_VERSION_CHARS),
            format_duration(age_s),
            str(gateway.in_flight),
            str(gateway.queued),
            "this one" if gateway.own else "",
        )
        table.add_row(*(Text(cell) for cell in cells))
    yield table
