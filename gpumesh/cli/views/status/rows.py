"""Makes the rows of the status table: one for each GPU, or one for a node without GPUs; chooses those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from gpumesh.cli.views.node_selection import health_rank
from gpumesh.mesh.history import History
from gpumesh.state import GpuState, MeshState, NodeState

# By the code of a finding: a short reason why a node's GPUs cannot be shown. The remark below the table says more.
NO_GPU_REASONS = {
    "driver-broken": "driver broken",
    "driver-mismatch": "driver mismatch",
    "driver-hung": "driver hangs",
    "gpu-cgroup-lost": "container lost",
    "gpu-lost": "GPU lost",
    "gpu-missing": "no GPU found",
    "gpu-unknown": "cannot be asked",
    "gpu-unreadable": "unreadable",
    "login-shell-slow": "shell is slow",
    "nvidia-smi-missing": "no nvidia-smi",
    "nvidia-smi-old": "driver too old",
}
GPU_LOST_CODE = "gpu-lost"


@dataclass(frozen=True, slots=True)
class StatusRow:
    """A row for one GPU, or, if ``gpu`` is ``None``, for the node alone.

    - ``first``: this is the node's first row.
    - ``at``: the time of the state that is shown.
    - ``no_gpu_reason``: what is wrong with the node's GPUs, in a row without a GPU; ``None`` if nothing is known.
    - ``utilization``: of the GPU, in percent, over the last minute.
    - ``selected``: the node is selected in the live table.
    """

    node: NodeState
    gpu: GpuState | None
    first: bool
    at: datetime
    no_gpu_reason: str | None = None
    utilization: tuple[float | None, ...] = ()
    selected: bool = False


def make_rows(state: MeshState, *, selected: str | None, history: History) -> list[StatusRow]:
    """The rows of all nodes in their order. ``selected``: the name of the selected node."""
    return [row for node in state.nodes for row in _node_rows(node, state, selected == node.name, history)]


def _node_rows(node: NodeState, state: MeshState, selected: bool, history: History) -> Iterator[StatusRow]:
    """Yields the rows of one node: one for each GPU and, if a GPU was lost, one more that says so. A node without GPUs
    has a single row, with the reason if it is known."""
    codes = [finding.code for finding in state.findings if finding.node == node.name]
    if not node.gpus:
        reason = next((NO_GPU_REASONS[code] for code in codes if code in NO_GPU_REASONS), None)
        yield StatusRow(node, None, first=True, at=state.at, no_gpu_reason=reason, selected=selected)
        return
    for position, gpu in enumerate(node.gpus):
        utilization = history.gpu_utilization(gpu.uuid)
        yield StatusRow(node, gpu, first=position == 0, at=state.at, utilization=utilization, selected=selected)
    if GPU_LOST_CODE in codes:  # one GPU is lost, the others answer
        reason = NO_GPU_REASONS[GPU_LOST_CODE]
        yield StatusRow(node, None, first=False, at=state.at, no_gpu_reason=reason, selected=selected)


def fit_rows(rows: list[StatusRow], room: int, selected: str | None) -> tuple[list[StatusRow], int]:
    """Returns at most ``room`` rows in their order, then the number of rows that are left out. If the node ``selected``
    has rows, the rows around its first row stay. Otherwise the rows of the nodes with the worst health stay."""
    hidden_count = len(rows) - room
    if hidden_count <= 0:
        return rows, 0
    selected_position = next((position for position, row in enumerate(rows) if row.node.name == selected), None)
    if selected_position is None:
        worst_first = sorted(range(len(rows)), key=lambda position: health_rank(rows[position].node))
        shown_positions = sorted(worst_first[:room])
        return [rows[position] for position in shown_positions], hidden_count
    start = min(max(selected_position - room // 2, 0), hidden_count)  # half of the rows before it, if there are so many
    return rows[start : start + room], hidden_count
