"""The line of the whole pool below the status table: nodes, GPUs, memory, tokens/s, requests, and the largest fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.text import Text

from gpumesh.cli.views.figures import format_gib, shorten
from gpumesh.mesh.models import memory_fit
from gpumesh.state import MeshState


def pool_line(state: MeshState, width: int) -> Text:
    """The parts, the most important first. A part for which there is no room is left out."""
    first, *others = _pool_parts(state)
    line = first
    for part in others:
        if cell_len(line) + 3 + cell_len(part) <= width:
            line += f" · {part}"
    return Text(shorten(line, width), style="bold", no_wrap=True)


def _pool_parts(state: MeshState) -> Iterator[str]:
    totals = state.totals
    yield f"{totals.nodes_up} of {totals.nodes} node{'' if totals.nodes == 1 else 's'} up"
    if totals.gpus is not None:
        yield f"{totals.gpus} GPU{'' if totals.gpus == 1 else 's'}"
    if totals.vram_total_mib is not None:
        yield f"{format_gib(totals.vram_free_mib)} of {format_gib(totals.vram_total_mib)} GiB free"
    yield f"{totals.tokens_per_s:.0f} tok/s"
    yield f"{state.gateway.in_flight} in flight"
    if state.gateway.queued:
        yield f"{state.gateway.queued} queued"
    if (fits := memory_fit.format_fits(memory_fit.find_largest_fits(state))) is not None:
        yield fits
