"""The rows of the status table: one for each GPU, or one for a node without GPUs; and which rows fit on a screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from gpumesh.cli.views.node_selection import health_rank
from gpumesh.mesh.history import History
from gpumesh.state import GpuState, MeshState, NodeState

# The code of a finding -> a short reason why a node's GPUs cannot be shown. The remark below the table says more.
NO_GPU_REASONS = {
    "driver-broken": "driver broken",
    "driver-mismatch": "driver mismatch",
    "driver-hung": "driver hangs",
    "gpu-cgroup-lost": "container lost",
    "gpu-lost": "GPU lost",
    "gpu-missing": "no GPU found",
    "gpu-unknown": "cannot be asked",
    "gpu-unreadable": "unreadable",
    "nvidia-smi-missing": "no nvidia-smi",
    "nvidia-smi-old": "driver too old",
}
GPU_LOST_CODE = "gpu-lost"


@dataclass(frozen=True, slots=True)
class StatusRow:
    """A row for one GPU, or, if ``gpu`` is ``None``, for the node alone. ``no_gpu_reason`` then says what is wrong with
    its GPUs, if anything. ``first``: this is the node's first row. ``utilization``: in percent, over the last
    minute."""

    node: NodeState
    gpu: GpuState | None
    first: bool
    at: datetime
    no_gpu_reason: str | None = None
    utilization: tuple[float | None, ...] = ()
    selected: bool = False


def make_rows(state: MeshState, *, selected: str | None, history: History) -> list[StatusRow]:
    return [row for node in state.nodes for row in _node_rows(node, state, selected == node.name, history)]


def _node_rows(node: NodeState, state: MeshState, selected: bool, history: History) -> Iterator[StatusRow]:
    codes = [finding.code for finding in state.findings if finding.node == node.name]
    if not node.gpus:
        reason = next((NO_GPU_REASONS[code] for code in codes if code in NO_GPU_REASONS), None)
        yield StatusRow(node, None, True, state.at, reason, selected=selected)
        return
    for position, gpu in enumerate(node.gpus):
        yield StatusRow(node, gpu, position == 0, state.at, None, history.gpu_utilization(gpu.uuid), selected)
    if GPU_LOST_CODE in codes:  # one GPU is lost, the others answer
        yield StatusRow(node, None, False, state.at, NO_GPU_REASONS[GPU_LOST_CODE], selected=selected)


def fit_rows(rows: list[StatusRow], room: int, selected: str | None) -> tuple[list[StatusRow], int]:
    """Returns the rows for which there is room, in their order, and the number of rows that are left out. Rows far from
    the selected node are left out; without a selection, rows of healthy nodes."""
    if len(rows) <= room:
        return rows, 0
    position = next((number for number, row in enumerate(rows) if row.node.name == selected), None)
    if position is None:
        fitting_ids = {id(row) for row in sorted(rows, key=lambda row: health_rank(row.node))[:room]}
        return [row for row in rows if id(row) in fitting_ids], len(rows) - room
    start = min(max(position - room // 2, 0), len(rows) - room)
    return rows[start : start + room], len(rows) - room
