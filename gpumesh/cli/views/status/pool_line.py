"""Draws the line of the whole pool below the status table: nodes, GPUs, memory, tokens/s, requests, largest fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.text import Text

from gpumesh.cli.views.figures import format_gib, shorten
from gpumesh.cli.views.status.token_rate import rate_now
from gpumesh.mesh.models import memory_fit
from gpumesh.state import MeshState


def pool_line(state: MeshState, width: int, hidden_remarks: int = 0) -> Text:
    """The figures of the pool in one line of at most ``width`` characters. A figure for which there is no room is left
    out. ``hidden_remarks``: the number of remarks for which the screen has no line."""
    line, *other_parts = _pool_parts(state, hidden_remarks)
    for part in other_parts:
        longer_line = f"{line} · {part}"
        if cell_len(longer_line) <= width:
            line = longer_line
    return Text(shorten(line, width), style="bold", no_wrap=True)


def _pool_parts(state: MeshState, hidden_remarks: int) -> Iterator[str]:
    """Yields the known figures as text, the most important first."""
    totals = state.totals
    yield f"{totals.nodes_up} of {totals.nodes} node{'' if totals.nodes == 1 else 's'} up"
    if hidden_remarks:
        yield f"{hidden_remarks} remark{'' if hidden_remarks == 1 else 's'} hidden"
    if totals.gpus is not None:
        yield f"{totals.gpus} GPU{'' if totals.gpus == 1 else 's'}"
    if totals.vram_total_mib is not None:
        yield f"{format_gib(totals.vram_free_mib)} of {format_gib(totals.vram_total_mib)} GiB free"
    yield f"{sum(rate_now(node) or 0.0 for node in state.nodes):.0f} tok/s"
    yield f"{state.gateway.in_flight} in flight"
    if state.gateway.queued:
        yield f"{state.gateway.queued} queued"
    largest_fits = memory_fit.format_fits(memory_fit.find_largest_fits(state))
    if largest_fits is not None:
        yield largest_fits
