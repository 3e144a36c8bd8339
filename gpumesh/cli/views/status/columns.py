"""The columns of the status table: the title and rank of each, and the function that draws its cell in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from rich.table import Table
from rich.text import Text

from gpumesh.cli.views.figures import (
    UNKNOWN,
    format_duration,
    format_gib,
    format_milliseconds,
    format_time_left,
    short_gpu,
    sparkline,
)
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.status.health_marks import MARKS, STYLES
from gpumesh.cli.views.status.rows import StatusRow
from gpumesh.cli.views.tables import Column, fit_table
from gpumesh.state import BackendPhase, GpuState, LoadedModel, NodeState, TunnelPhase

WIDE_TERMINAL = 150  # characters; from here on the columns FULL_WIDTH_TITLES are not narrowed
FULL_WIDTH_TITLES = ("NODE", "GPU")
HOT_C = 83  # where a 4090 begins to slow down
SHOWN_MODELS = 2

DrawCell = Callable[[StatusRow, int], Text]


def status_table(rows: Sequence[StatusRow], width: int) -> Table:
    """The table of these rows, with the columns that fit into ``width`` characters."""
    bar_length = 4 if width < 80 else 6 if width < 110 else 8 if width < 150 else 14
    columns = []
    for column, draw in COLUMNS:
        # A wide terminal has room for more than the most important columns, so they need not be narrowed.
        in_full = width >= WIDE_TERMINAL and column.title in FULL_WIDTH_TITLES
        cells = [draw(row, bar_length) for row in rows]
        columns.append((replace(column, min_width=None) if in_full else column, cells))
    return fit_table(columns, width, styles=["reverse" if row.selected else "" for row in rows])


def _node_column(cell: Callable[[NodeState, datetime], Text | str]) -> DrawCell:
    """A column about the node: filled in the node's first row only."""

    def draw(row: StatusRow, _bar_length: int) -> Text:
        content = cell(row.node, row.at) if row.first else ""
        return content if isinstance(content, Text) else Text(content)

    return draw


def _gpu_column(cell: Callable[[GpuState], Text | str]) -> DrawCell:
    """A column about the GPU."""

    def draw(row: StatusRow, _bar_length: int) -> Text:
        if row.gpu is None:
            return Text(UNKNOWN if row.first else "")
        content = cell(row.gpu)
        return content if isinstance(content, Text) else Text(content)

    return draw


# -- cells of GPUs ---------------------------------------------------------------------------------------------------


def bar_text(share: float | None, length: int, low: float, high: float) -> Text:
    """A share (0 to 1) as a bar: green below ``low``, red from ``high`` on (nvitop's thresholds)."""
    if share is None:
        return Text("░" * length, style="dim")
    share = min(max(share, 0.0), 1.0)
    full = round(share * length)
    if share >= 0.01 and full == 0:  # from one percent on, the bar is not empty
        full = 1
    style = "green" if share < low else "yellow" if share < high else "red"
    return Text.assemble(("█" * full, style), ("░" * (length - full), "dim"))


def _gpu_cell(row: StatusRow, _bar_length: int) -> Text:
    """The name of the card, after its index if the node has several; or the reason why no GPU is shown."""
    gpu = row.gpu
    if gpu is None:
        if row.no_gpu_reason is not None:
            return Text(row.no_gpu_reason, style="red")
        return Text("none" if row.node.gpus is not None else UNKNOWN, style="dim")
    card, slice_mark, slice_name = short_gpu(clean_line(gpu.name, 40)).partition("MIG")
    if slice_mark or gpu.uuid.startswith("MIG-"):  # the slice comes first: the card's name may be cut
        card = " ".join(("MIG", *slice_name.split(), *card.split()))
    several = row.node.gpus is not None and len(row.node.gpus) > 1
    return Text(f"{gpu.index} {card}" if several else card)


def _memory_cell(row: StatusRow, bar_length: int) -> Text:
    gpu = row.gpu
    if gpu is None:
        return Text(UNKNOWN if row.first else "")
    if gpu.memory_total_mib is None:
        return Text(UNKNOWN)
    used = gpu.memory_used_mib
    share = None if used is None or not gpu.memory_total_mib else used / gpu.memory_total_mib
    return bar_text(share, bar_length, 0.10, 0.80).append(f" {format_gib(used):>4}/{format_gib(gpu.memory_total_mib)}")


def _utilization_cell(row: StatusRow, bar_length: int) -> Text:
    if row.gpu is None or row.gpu.utilization_pct is None:
        return Text(UNKNOWN if row.first or row.gpu is not None else "")
    percent = row.gpu.utilization_pct
    return bar_text(percent / 100, bar_length, 0.10, 0.75).append(f" {percent:>3}%")


def _last_minute_cell(row: StatusRow, _bar_length: int) -> Text:
    if all(value is None for value in row.utilization):
        return Text("")
    return Text(sparkline(row.utilization, 100), style="cyan")


def _temperature_cell(gpu: GpuState) -> Text | str:
    if gpu.temperature_c is None:
        return UNKNOWN
    slowed = gpu.throttle is not None and ("thermal" in gpu.throttle or "slowdown" in gpu.throttle)
    return Text(f"{gpu.temperature_c}°", style="red" if slowed or gpu.temperature_c >= HOT_C else "")


def _power_cell(gpu: GpuState) -> str:
    if gpu.power_w is None:
        return UNKNOWN
    return f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W" if gpu.power_limit_w is not None else f"{gpu.power_w:.0f} W"


# -- cells of nodes --------------------------------------------------------------------------------------------------


def _node_cell(node: NodeState, _at: datetime) -> Text:
    return Text.assemble((MARKS[node.health], STYLES[node.health]), " ", (clean_line(node.name, 24), "bold"))


def _health_cell(node: NodeState, _at: datetime) -> Text:
    return Text(str(node.health), style=STYLES[node.health])


def _loaded_cell(node: NodeState, at: datetime) -> str:
    backend = node.backend
    if backend.state is not BackendPhase.UP:
        return UNKNOWN
    if not backend.loaded:
        return f"({len(backend.models)} on disk)" if backend.models else "none"
    shown_models = [_loaded_model_text(model, at) for model in backend.loaded[:SHOWN_MODELS]]
    hidden_count = len(backend.loaded) - len(shown_models)
    return ", ".join(shown_models) + (f" +{hidden_count}" if hidden_count else "")


def _loaded_model_text(model: LoadedModel, at: datetime) -> str:
    text = clean_line(model.name.rpartition("/")[2] or model.name, 40)  # without the registry that it came from
    if model.size_mib and model.size_vram_mib is not None and model.size_vram_mib < model.size_mib:
        text += f" ({100 - round(100 * model.size_vram_mib / model.size_mib)}% CPU)"
    time_left = format_time_left(model.expires_at, at)
    return f"{text} {time_left}" if time_left is not None else text


def _busy_cell(node: NodeState, _at: datetime) -> str:
    load = node.load
    text = str(load.in_flight) if load.limit is None else f"{load.in_flight}/{load.limit}"
    return f"{text} +{load.queued}" if load.queued else text


def _rate_cell(node: NodeState, _at: datetime) -> str:
    rate = node.backend.tokens_per_s
    return UNKNOWN if rate is None else f"{rate:.0f}" if rate >= 9.95 or rate == 0 else f"{rate:.1f}"


def _round_trip_cell(node: NodeState, _at: datetime) -> str:
    return format_milliseconds(node.tunnel.rtt_ms)


def _tunnel_cell(node: NodeState, at: datetime) -> str:
    tunnel = node.tunnel
    text = f"{clean_line(tunnel.transport, 12)} {tunnel.state}"
    if tunnel.state is TunnelPhase.UP and tunnel.since is not None:
        text += f" {format_duration((at - tunnel.since).total_seconds())}"
    return text + (f" ↻{tunnel.reconnects}" if tunnel.reconnects else "")


def _backend_cell(node: NodeState, _at: datetime) -> str:
    if node.backend.state is not BackendPhase.UP:
        return f"{clean_line(node.backend.kind, 10)} {node.backend.state}"
    return f"{clean_line(node.backend.kind, 10)} {clean_line(node.backend.version or '', 20)}".rstrip()


def _served_cell(node: NodeState, _at: datetime) -> str:
    return str(node.load.served)


# The columns in their order on the screen.
COLUMNS: tuple[tuple[Column, DrawCell], ...] = (
    (Column("NODE", 0, min_width=14), _node_column(_node_cell)),
    (Column("HEALTH", 1), _node_column(_health_cell)),
    (Column("GPU", 4, min_width=13), _gpu_cell),
    (Column("MEMORY GiB", 2), _memory_cell),
    (Column("UTIL", 3), _utilization_cell),
    (Column("LAST MIN", 11), _last_minute_cell),
    (Column("TEMP", 7, right=True), _gpu_column(_temperature_cell)),
    (Column("POWER", 10, right=True), _gpu_column(_power_cell)),
    (Column("LOADED", 8, min_width=22), _node_column(_loaded_cell)),
    (Column("TOK/S", 6, right=True), _node_column(_rate_cell)),
    (Column("BUSY", 5, right=True), _node_column(_busy_cell)),
    (Column("RTT", 9, right=True), _node_column(_round_trip_cell)),
    (Column("TUNNEL", 12), _node_column(_tunnel_cell)),
    (Column("BACKEND", 13), _node_column(_backend_cell)),
    (Column("SERVED", 14, right=True), _node_column(_served_cell)),
)
