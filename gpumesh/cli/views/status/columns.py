"""The columns of the status table: their titles and ranks, and the functions that draw their cells."""

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
from gpumesh.cli.views.status.health_marks import FIGURE_STYLE, MARKS, STYLES
from gpumesh.cli.views.status.rows import StatusRow
from gpumesh.cli.views.status.token_rate import rate_now
from gpumesh.cli.views.tables import Column, fit_table
from gpumesh.state import BackendPhase, GpuState, LoadedModel, NodeState, TunnelPhase

WIDE_TERMINAL = 150  # characters; from here on the columns FULL_WIDTH_TITLES are not narrowed
FULL_WIDTH_TITLES = ("NODE", "GPU")
# Pairs: the least width of a terminal, and the length of bars on it, both in characters.
_BAR_LENGTHS = ((150, 14), (110, 8), (80, 6), (0, 4))
HOT_C = 83  # degrees Celsius, at which a 4090 begins to slow down
SHOWN_MODELS = 2  # of the loaded models of a node; the others are counted

DrawCell = Callable[[StatusRow, int], Text]
"""Draws the cell of a row. The second argument is the length of bars, in characters."""


def status_table(rows: Sequence[StatusRow], width: int) -> Table:
    """The table of these rows, with the columns that fit into ``width`` characters."""
    bar_length = next(length for min_width, length in _BAR_LENGTHS if width >= min_width)
    columns = []
    for column, draw_cell in COLUMNS:
        cells = [draw_cell(row, bar_length) for row in rows]
        # A wide terminal has room for more than the most important columns, so they need not be narrowed.
        if width >= WIDE_TERMINAL and column.title in FULL_WIDTH_TITLES:
            columns.append((replace(column, min_width=None), cells))
        else:
            columns.append((column, cells))
    return fit_table(columns, width, styles=["reverse" if row.selected else "" for row in rows])


def _node_column(cell: Callable[[NodeState, datetime], Text | str]) -> DrawCell:
    """The drawing of a column about the node, which is empty except in the node's first row. ``cell`` gets the node and
    the time of the state."""

    def draw(row: StatusRow, _bar_length: int) -> Text:
        content = cell(row.node, row.at) if row.first else ""
        return content if isinstance(content, Text) else Text(content)

    return draw


def _gpu_column(cell: Callable[[GpuState], Text | str]) -> DrawCell:
    """The drawing of a column about the GPU. In a row without a GPU the cell is a dash if this is the node's only row,
    and empty if it follows the rows of other GPUs."""

    def draw(row: StatusRow, _bar_length: int) -> Text:
        if row.gpu is None:
            return Text(UNKNOWN if row.first else "")
        content = cell(row.gpu)
        return content if isinstance(content, Text) else Text(content)

    return draw


# -- cells of GPUs ---------------------------------------------------------------------------------------------------


def bar_text(share: float | None, length: int) -> Text:
    """A share (0 to 1) as a bar of ``length`` characters. All shares have one colour, because neither a busy GPU nor a
    full one is a fault. An unknown share is an empty bar."""
    if share is None:
        return Text("░" * length, style="dim")
    share = min(max(share, 0.0), 1.0)
    filled = round(share * length)
    if share >= 0.01 and filled == 0:  # from one percent on, the bar is not empty
        filled = 1
    return Text.assemble(("█" * filled, FIGURE_STYLE), ("░" * (length - filled), "dim"))


def _gpu_cell(row: StatusRow, _bar_length: int) -> Text:
    """The name of the card, after its index if the node has several. In a row without a GPU: the reason, if it is
    known; ``none`` if the node has no GPU; a dash if its GPUs are not known."""
    gpu = row.gpu
    if gpu is None:
        if row.no_gpu_reason is not None:
            return Text(row.no_gpu_reason, style="red")
        return Text("none" if row.node.gpus is not None else UNKNOWN, style="dim")
    # "A100 MIG 1g.5gb" is shown as "MIG 1g.5gb A100": the slice comes first, because the end may be cut off.
    card, slice_mark, slice_name = short_gpu(clean_line(gpu.name, 40)).partition("MIG")
    if slice_mark or gpu.uuid.startswith("MIG-"):  # some names of slices do not say MIG
        card = " ".join(("MIG", *slice_name.split(), *card.split()))
    has_several_gpus = row.node.gpus is not None and len(row.node.gpus) > 1
    return Text(f"{gpu.index} {card}" if has_several_gpus else card)


def _memory_cell(row: StatusRow, bar_length: int) -> Text:
    """The used share of the GPU's memory as a bar, then the used and the whole memory in GiB. A dash if they are not
    known. Without a GPU: as in ``_gpu_column``."""
    gpu = row.gpu
    if gpu is None:
        return Text(UNKNOWN if row.first else "")
    total_mib, used_mib = gpu.memory_total_mib, gpu.memory_used_mib
    if total_mib is None:
        return Text(UNKNOWN)
    share = None if used_mib is None or total_mib == 0 else used_mib / total_mib
    return bar_text(share, bar_length).append(f" {format_gib(used_mib):>4}/{format_gib(total_mib)}")


def _utilization_cell(row: StatusRow, bar_length: int) -> Text:
    """The utilization of the GPU as a bar, then in percent. A dash if it is not known. Without a GPU: as in
    ``_gpu_column``."""
    if row.gpu is None:
        return Text(UNKNOWN if row.first else "")
    percent = row.gpu.utilization_pct
    if percent is None:
        return Text(UNKNOWN)
    return bar_text(percent / 100, bar_length).append(f" {percent:>3}%")


def _last_minute_cell(row: StatusRow, _bar_length: int) -> Text:
    """The utilization of the GPU over the last minute as a sparkline from 0 to 100 %; empty if nothing is known."""
    if all(value is None for value in row.utilization):
        return Text("")
    return Text(sparkline(row.utilization, 100), style=FIGURE_STYLE)


def _temperature_cell(gpu: GpuState) -> Text | str:
    """The temperature: yellow, as the finding about it, if the GPU is hot, or slows down because of heat or power."""
    if gpu.temperature_c is None:
        return UNKNOWN
    # ``throttle`` is text: nvidia-smi's reasons with commas between them, as in ``hw-slowdown,thermal``.
    is_slowed = gpu.throttle is not None and ("thermal" in gpu.throttle or "slowdown" in gpu.throttle)
    return Text(f"{gpu.temperature_c}°", style="yellow" if is_slowed or gpu.temperature_c >= HOT_C else "")


def _power_cell(gpu: GpuState) -> str:
    """The power draw, and its limit if it is known, in watts."""
    if gpu.power_w is None:
        return UNKNOWN
    if gpu.power_limit_w is None:
        return f"{gpu.power_w:.0f} W"
    return f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W"


# -- cells of nodes --------------------------------------------------------------------------------------------------


def _node_cell(node: NodeState, _at: datetime) -> Text:
    """The mark of the node's health, then the node's name."""
    text = Text.assemble((MARKS[node.health], STYLES[node.health]), " ", (clean_line(node.name, 24), "bold"))
    return text.append(" pool", style="cyan") if node.pool_members else text


def _health_cell(node: NodeState, _at: datetime) -> Text:
    return Text(str(node.health), style=STYLES[node.health])


def _loaded_cell(node: NodeState, at: datetime) -> str:
    """The models that the node has loaded. If it has loaded none: how many models it has on disk."""
    backend = node.backend
    if backend.state is not BackendPhase.UP:
        return UNKNOWN
    if not backend.loaded:
        return f"({len(backend.models)} on disk)" if backend.models else "none"
    shown_models = [_loaded_model_text(model, at) for model in backend.loaded[:SHOWN_MODELS]]
    hidden_count = len(backend.loaded) - len(shown_models)
    return ", ".join(shown_models) + (f" +{hidden_count}" if hidden_count else "")


def _loaded_model_text(model: LoadedModel, at: datetime) -> str:
    """The model's name, the share of the model that is not in GPU memory (if some is not), and how long the model stays
    loaded: ``qwen2.5:7b (25% CPU) 4m``."""
    _, _, name_without_registry = model.name.rpartition("/")  # as in ``hf.co/owner/model:tag``
    text = clean_line(name_without_registry or model.name, 40)
    # Both sizes are known, and a part of the model has no place in GPU memory.
    if model.size_mib and model.size_vram_mib is not None and model.size_vram_mib < model.size_mib:
        gpu_percent = round(100 * model.size_vram_mib / model.size_mib)
        text += f" ({100 - gpu_percent}% CPU)"
    time_left = format_time_left(model.expires_at, at)
    return f"{text} {time_left}" if time_left is not None else text


def _busy_cell(node: NodeState, _at: datetime) -> str:
    """The requests in flight, how many requests the node runs at once (if known), and the queued requests (if any):
    ``2/4 +1``."""
    load = node.load
    text = str(load.in_flight) if load.limit is None else f"{load.in_flight}/{load.limit}"
    return f"{text} +{load.queued}" if load.queued else text


def _rate_cell(node: NodeState, _at: datetime) -> str:
    """The node's tokens per second, with one decimal below 10."""
    rate = rate_now(node)
    if rate is None:
        return UNKNOWN
    return f"{rate:.1f}" if 0 < rate < 9.95 else f"{rate:.0f}"  # with a decimal, 9.95 would become "10.0"


def _round_trip_cell(node: NodeState, _at: datetime) -> str:
    return format_milliseconds(node.tunnel.rtt_ms)


def _tunnel_cell(node: NodeState, at: datetime) -> str:
    """The transport and state of the tunnel, for how long it has been up, and how often it was opened again."""
    tunnel = node.tunnel
    text = f"{clean_line(tunnel.transport, 12)} {tunnel.state}"
    if tunnel.state is TunnelPhase.UP and tunnel.since is not None:
        text += f" {format_duration((at - tunnel.since).total_seconds())}"
    return text + (f" ↻{tunnel.reconnects}" if tunnel.reconnects else "")


def _backend_cell(node: NodeState, _at: datetime) -> str:
    """The kind of inference server, with its version while it is up, else with its state."""
    kind = clean_line(node.backend.kind, 10)
    if node.backend.state is not BackendPhase.UP:
        return f"{kind} {node.backend.state}"
    return f"{kind} {clean_line(node.backend.version or '', 20)}".rstrip()


def _served_cell(node: NodeState, _at: datetime) -> str:
    return str(node.load.served)


_LOADED = "LOADED"  # on a narrow terminal, figures of the GPU and of the way to it give way to the loaded models

# The columns in their order on the screen. The second argument is the rank: low ranks get their place first.
COLUMNS: tuple[tuple[Column, DrawCell], ...] = (
    (Column("NODE", 0, min_width=14), _node_column(_node_cell)),
    (Column("HEALTH", 1), _node_column(_health_cell)),
    (Column("GPU", 4, min_width=15), _gpu_cell),
    (Column("MEMORY GiB", 2), _memory_cell),
    (Column("UTIL", 3), _utilization_cell),
    (Column("LAST MIN", 11, only_after=_LOADED), _last_minute_cell),
    (Column("TEMP", 8, right=True, only_after=_LOADED), _gpu_column(_temperature_cell)),
    (Column("POWER", 10, right=True, only_after=_LOADED), _gpu_column(_power_cell)),
    (Column(_LOADED, 6, min_width=12), _node_column(_loaded_cell)),
    (Column("TOK/S", 7, right=True), _node_column(_rate_cell)),
    (Column("BUSY", 5, right=True), _node_column(_busy_cell)),
    (Column("RTT", 9, right=True, only_after=_LOADED), _node_column(_round_trip_cell)),
    (Column("TUNNEL", 12), _node_column(_tunnel_cell)),
    (Column("BACKEND", 13), _node_column(_backend_cell)),
    (Column("SERVED", 14, right=True), _node_column(_served_cell)),
)
