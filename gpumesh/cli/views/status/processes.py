"""The processes on the GPUs, which `status -v` adds."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from gpumesh.cli.views.figures import UNKNOWN
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import new_table
from gpumesh.state import MeshState


def process_views(state: MeshState) -> Iterator[RenderableType]:
    """A table of the processes, those with the most memory first; a remark when there are none."""
    rows = [
        (node.name, gpu.index, process)
        for node in state.nodes
        for gpu in node.gpus or ()
        for process in sorted(gpu.processes, key=lambda process: -(process.used_memory_mib or 0))
    ]
    if not rows:
        yield Text("no process is seen on any GPU (inside a container the list is empty)", style="dim")
        return
    table = new_table()
    for title in ("NODE", "GPU", "PID", "MiB", "PROCESS"):
        table.add_column(
            title, no_wrap=True, overflow="ellipsis", justify="right" if title in ("PID", "MiB") else "left"
        )
    for name, index, process in rows:
        memory = UNKNOWN if process.used_memory_mib is None else str(process.used_memory_mib)
        cells = (clean_line(name, 24), str(index), str(process.pid), memory, clean_line(process.name, 100))
        table.add_row(*(Text(cell) for cell in cells))
    yield table
