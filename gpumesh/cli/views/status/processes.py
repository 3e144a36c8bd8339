"""Draws the table of processes on the GPUs, which `status -v` adds."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from gpumesh.cli.views.figures import UNKNOWN
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import new_table
from gpumesh.state import MeshState


def process_views(state: MeshState) -> Iterator[RenderableType]:
    """Yields a table of the processes, on each GPU the process with the most memory first; or a remark when there are
    none."""
    processes = [
        (node.name, gpu.index, process)
        for node in state.nodes
        for gpu in node.gpus or ()
        for process in sorted(gpu.processes, key=lambda process: -(process.used_memory_mib or 0))
    ]
    if not processes:
        yield Text("no process is seen on any GPU (inside a container the list is empty)", style="dim")
        return
    table = new_table()
    table.add_column("NODE", no_wrap=True, overflow="ellipsis")
    table.add_column("GPU", no_wrap=True, overflow="ellipsis")
    table.add_column("PID", no_wrap=True, overflow="ellipsis", justify="right")
    table.add_column("MiB", no_wrap=True, overflow="ellipsis", justify="right")
    table.add_column("PROCESS", no_wrap=True, overflow="ellipsis")
    for node_name, gpu_index, process in processes:
        memory = UNKNOWN if process.used_memory_mib is None else str(process.used_memory_mib)
        cells = (clean_line(node_name, 24), str(gpu_index), str(process.pid), memory, clean_line(process.name, 100))
        table.add_row(*(Text(cell) for cell in cells))
    yield table
