"""How `status` looks: nodes and GPUs in a table that has as many columns as there is room for, what is wrong below it,
and the pool in one line. Everything that came from a host is cleaned here, and reaches rich as ``Text``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpumesh.cli.text import (
    UNKNOWN,
    clean_line,
    format_duration,
    format_gib,
    format_milliseconds,
    format_time_left,
    short_gpu,
    shorten,
    sparkline,
)
from gpumesh.cli.views.local_access import access_lines
from gpumesh.cli.views.node_selection import health_rank
from gpumesh.cli.views.tables import (
    SEVERITIES,
    Column,
    add_hint,
    console,
    finding_text,
    fit_table,
    make_notes_table,
    new_table,
    print_plain,
)
from gpumesh.mesh.history import History
from gpumesh.mesh.models import memory_fit
from gpumesh.state import (
    BackendPhase,
    Finding,
    GpuState,
    Health,
    LoadedModel,
    MeshState,
    NodeState,
    TunnelPhase,
    TunnelState,
)

MARKS = {Health.HEALTHY: "●", Health.DEGRADED: "◐", Health.DOWN: "✗", Health.DRAINING: "‖", Health.UNKNOWN: "?"}
STYLES = {
    Health.HEALTHY: "green",
    Health.DEGRADED: "yellow",
    Health.DOWN: "red",
    Health.DRAINING: "cyan",
    Health.UNKNOWN: "dim",
}
# Why a node's GPUs cannot be shown, in a few words; the finding below the table says it in full.
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
MAX_NAMED_NODES = 4
WIDE_TERMINAL, FULL_WIDTH_TITLES = 150, ("NODE", "GPU")
HOT_C = 83  # where a 4090 begins to slow down


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """What of the state is shown, and how. ``height``: a screen that cannot scroll, so rows are left out: all but those
    around ``selected``, or without one the healthy ones first."""

    verbose: bool = False
    height: int | None = None
    selected: str | None = None
    history: History = field(default_factory=History)


@dataclass(frozen=True, slots=True)
class _Row:
    """``gpu`` is ``None`` in a row of the node alone; ``why`` says then what is wrong with its GPUs, if anything."""

    node: NodeState
    gpu: GpuState | None
    first: bool
    at: datetime
    why: str | None = None
    recent: tuple[float | None, ...] = ()
    selected: bool = False


def print_status(state: MeshState, options: ViewOptions | None = None) -> None:
    out = console()
    print_plain(out, status_view(state, out.width, options or ViewOptions()))


def status_view(state: MeshState, width: int, options: ViewOptions) -> RenderableType:
    """The whole of `status`."""
    notes = _notes(state) if width >= 20 else []
    rows = [row for node in state.nodes for row in _rows(node, state, options)]
    left_out = 0
    if options.height is not None:
        notes, height = _first(notes, width, max(options.height - len(rows) - 5, options.height // 3, 2))
        rows, left_out = _within(rows, max(options.height - height - 6, 1), options.selected)
    parts: list[RenderableType] = [_head(state, width), _status_table(rows, width)]
    if left_out:
        parts.append(Text(f"… and {left_out} more rows", style="dim"))
    parts.append(_totals(state, width))
    if options.verbose:
        parts.extend(_processes(state))
        parts.extend(Text(line, style="dim") for line in access_lines(state))
    if notes:
        parts.append(make_notes_table(notes))
    return Group(*parts)


_Note = tuple[Text, Text]


def _first(notes: list[_Note], width: int, room: int) -> tuple[list[_Note], int]:
    """As many as fit into so many lines, with a word about the rest; and how many lines they take."""
    out, taken, used = console(), list[_Note](), 0
    for place, note in enumerate(notes):
        height = len(note[1].wrap(out, max(width - 2, 1), overflow="fold"))
        last = place == len(notes) - 1
        if used + height + (not last) > room:
            more = len(notes) - place
            words = f"{more} {'more ' if taken else ''}remark{'' if more == 1 else 's'}: `gpumesh status` says all"
            return [*taken, (Text("…", style="dim"), Text(shorten(words, max(width - 2, 1)), style="dim"))], used + 1
        taken.append(note)
        used += height
    return taken, used


def _within(rows: list[_Row], room: int, selected: str | None) -> tuple[list[_Row], int]:
    """As many rows as there is room for, in their order, and how many are left out."""
    if len(rows) <= room:
        return rows, 0
    place = next((number for number, row in enumerate(rows) if row.node.name == selected), None)
    if place is None:
        keep = {id(row) for row in sorted(rows, key=lambda row: health_rank(row.node))[:room]}
        return [row for row in rows if id(row) in keep], len(rows) - room
    start = min(max(place - room // 2, 0), len(rows) - room)
    return rows[start : start + room], len(rows) - room


def _head(state: MeshState, width: int) -> Text:
    head = Text(clean_line(state.mesh, 30), style="bold", no_wrap=True, overflow="ellipsis")
    gateway = state.gateway
    if gateway.url is not None:
        head.append(f"  {clean_line(gateway.url)} {gateway.state}", style="not bold cyan")
    if any(node.simulated for node in state.nodes):
        head.append("  simulated hosts", style="not bold yellow")
    if width >= 80:
        head.append(f"  {state.at.astimezone():%H:%M:%S}", style="not bold dim")
    return head


def _rows(node: NodeState, state: MeshState, look: ViewOptions) -> Iterator[_Row]:
    chosen = node.name == look.selected
    codes = [finding.code for finding in state.findings if finding.node == node.name]
    if not node.gpus:
        why = next((NO_GPU_REASONS[code] for code in codes if code in NO_GPU_REASONS), None)
        yield _Row(node, None, True, state.at, why, selected=chosen)
        return
    for position, gpu in enumerate(node.gpus):
        yield _Row(node, gpu, position == 0, state.at, None, look.history.gpu_utilization(gpu.uuid), chosen)
    if GPU_LOST_CODE in codes:  # the others answer
        yield _Row(node, None, False, state.at, NO_GPU_REASONS[GPU_LOST_CODE], selected=chosen)


def _status_table(rows: Sequence[_Row], width: int) -> Table:
    bar = 4 if width < 80 else 6 if width < 110 else 8 if width < 150 else 14
    columns = [
        # With room for more than the most telling columns those are not cut for the sake of the others.
        (
            replace(column, min_width=None) if width >= WIDE_TERMINAL and column.title in FULL_WIDTH_TITLES else column,
            [draw(row, bar) for row in rows],
        )
        for column, draw in COLUMNS
    ]
    return fit_table(columns, width, styles=["reverse" if row.selected else "" for row in rows])


def _of_node(cell: Callable[[NodeState, datetime], Text | str]) -> Callable[[_Row, int], Text]:
    """A column that says something about the node: once, in its first row."""

    def draw(row: _Row, _bar: int) -> Text:
        said = cell(row.node, row.at) if row.first else ""
        return said if isinstance(said, Text) else Text(said)

    return draw


def _of_gpu(cell: Callable[[GpuState], Text | str]) -> Callable[[_Row, int], Text]:
    def draw(row: _Row, _bar: int) -> Text:
        said = "" if row.gpu is None and not row.first else UNKNOWN if row.gpu is None else cell(row.gpu)
        return said if isinstance(said, Text) else Text(said)

    return draw


def _name(node: NodeState, _at: datetime) -> Text:
    return Text.assemble((MARKS[node.health], STYLES[node.health]), " ", (clean_line(node.name, 24), "bold"))


def _gpu_name(row: _Row, _bar: int) -> Text:
    gpu = row.gpu
    if gpu is None:
        if row.why is not None:
            return Text(row.why, style="red")
        return Text("none" if row.node.gpus is not None else UNKNOWN, style="dim")
    card, is_slice, part = short_gpu(clean_line(gpu.name, 40)).partition("MIG")
    if is_slice or gpu.uuid.startswith("MIG-"):  # what it is comes first: the card's name may be cut
        card = " ".join(("MIG", *part.split(), *card.split()))
    several = row.node.gpus is not None and len(row.node.gpus) > 1
    return Text(f"{gpu.index} {card}" if several else card)


def bar_text(part: float | None, length: int, low: float, high: float) -> Text:
    """``part`` of 1 as a bar; green below ``low``, red above ``high`` (nvitop's thresholds)."""
    if part is None:
        return Text("░" * length, style="dim")
    part = min(max(part, 0.0), 1.0)
    full = round(part * length)
    if part >= 0.01 and full == 0:
        full = 1
    style = "green" if part < low else "yellow" if part < high else "red"
    return Text.assemble(("█" * full, style), ("░" * (length - full), "dim"))


def _memory(row: _Row, bar: int) -> Text:
    gpu = row.gpu
    if gpu is None:
        return Text(UNKNOWN if row.first else "")
    if gpu.memory_total_mib is None:
        return Text(UNKNOWN)
    used = gpu.memory_used_mib
    part = None if used is None or not gpu.memory_total_mib else used / gpu.memory_total_mib
    return bar_text(part, bar, 0.10, 0.80).append(f" {format_gib(used):>4}/{format_gib(gpu.memory_total_mib)}")


def _utilization(row: _Row, bar: int) -> Text:
    if row.gpu is None or row.gpu.utilization_pct is None:
        return Text(UNKNOWN if row.first or row.gpu is not None else "")
    percent = row.gpu.utilization_pct
    return bar_text(percent / 100, bar, 0.10, 0.75).append(f" {percent:>3}%")


def _recent(row: _Row, _bar: int) -> Text:
    if all(value is None for value in row.recent):
        return Text("")
    return Text(sparkline(row.recent, 100), style="cyan")


def _temperature(gpu: GpuState) -> Text | str:
    if gpu.temperature_c is None:
        return UNKNOWN
    slowed = gpu.throttle is not None and ("thermal" in gpu.throttle or "slowdown" in gpu.throttle)
    return Text(f"{gpu.temperature_c}°", style="red" if slowed or gpu.temperature_c >= HOT_C else "")


def _power(gpu: GpuState) -> str:
    if gpu.power_w is None:
        return UNKNOWN
    return f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W" if gpu.power_limit_w is not None else f"{gpu.power_w:.0f} W"


def _models(node: NodeState, at: datetime) -> str:
    backend = node.backend
    if backend.state is not BackendPhase.UP:
        return UNKNOWN
    if not backend.loaded:
        return f"({len(backend.models)} on disk)" if backend.models else "none"
    said = [_loaded(model, at) for model in backend.loaded[:2]]
    more = len(backend.loaded) - len(said)
    return ", ".join(said) + (f" +{more}" if more else "")


def _loaded(model: LoadedModel, at: datetime) -> str:
    words = clean_line(model.name.rpartition("/")[2] or model.name, 40)  # without where it was pulled from
    if model.size_mib and model.size_vram_mib is not None and model.size_vram_mib < model.size_mib:
        words += f" ({100 - round(100 * model.size_vram_mib / model.size_mib)}% CPU)"
    left = format_time_left(model.expires_at, at)
    return f"{words} {left}" if left is not None else words


def _in_flight(node: NodeState, _at: datetime) -> str:
    load = node.load
    said = str(load.in_flight) if load.limit is None else f"{load.in_flight}/{load.limit}"
    return f"{said} +{load.queued}" if load.queued else said


def _rate(node: NodeState, _at: datetime) -> str:
    rate = node.backend.tokens_per_s
    return UNKNOWN if rate is None else f"{rate:.0f}" if rate >= 9.95 or rate == 0 else f"{rate:.1f}"


def _tunnel(tunnel: TunnelState, at: datetime) -> str:
    said = f"{clean_line(tunnel.transport, 12)} {tunnel.state}"
    if tunnel.state is TunnelPhase.UP and tunnel.since is not None:
        said += f" {format_duration((at - tunnel.since).total_seconds())}"
    return said + (f" ↻{tunnel.reconnects}" if tunnel.reconnects else "")


def _backend(node: NodeState, _at: datetime) -> str:
    if node.backend.state is not BackendPhase.UP:
        return f"{clean_line(node.backend.kind, 10)} {node.backend.state}"
    return f"{clean_line(node.backend.kind, 10)} {clean_line(node.backend.version or '', 20)}".rstrip()


# In their order on the screen.
COLUMNS: tuple[tuple[Column, Callable[[_Row, int], Text]], ...] = (
    (Column("NODE", 0, min_width=14), _of_node(_name)),
    (Column("HEALTH", 1), _of_node(lambda node, _: Text(str(node.health), style=STYLES[node.health]))),
    (Column("GPU", 4, min_width=13), _gpu_name),
    (Column("MEMORY GiB", 2), _memory),
    (Column("UTIL", 3), _utilization),
    (Column("LAST MIN", 11), _recent),
    (Column("TEMP", 7, right=True), _of_gpu(_temperature)),
    (Column("POWER", 10, right=True), _of_gpu(_power)),
    (Column("LOADED", 8, min_width=22), _of_node(_models)),
    (Column("TOK/S", 6, right=True), _of_node(_rate)),
    (Column("BUSY", 5, right=True), _of_node(_in_flight)),
    (Column("RTT", 9, right=True), _of_node(lambda node, _: format_milliseconds(node.tunnel.rtt_ms))),
    (Column("TUNNEL", 12), _of_node(lambda node, at: _tunnel(node.tunnel, at))),
    (Column("BACKEND", 13), _of_node(_backend)),
    (Column("SERVED", 14, right=True), _of_node(lambda node, _: str(node.load.served))),
)


def _totals(state: MeshState, width: int) -> Text:
    """The pool, by importance; what there is no room for is left out whole."""
    totals = state.totals
    parts = [f"{totals.nodes_up} of {totals.nodes} node{'' if totals.nodes == 1 else 's'} up"]
    if totals.gpus is not None:
        parts.append(f"{totals.gpus} GPU{'' if totals.gpus == 1 else 's'}")
    if totals.vram_total_mib is not None:
        parts.append(f"{format_gib(totals.vram_free_mib)} of {format_gib(totals.vram_total_mib)} GiB free")
    parts.append(f"{totals.tokens_per_s:.0f} tok/s")
    parts.append(f"{state.gateway.in_flight} in flight")
    if state.gateway.queued:
        parts.append(f"{state.gateway.queued} queued")
    if (room := memory_fit.format_fits(memory_fit.find_largest_fits(state))) is not None:
        parts.append(room)
    said = parts[0]
    for part in parts[1:]:
        if cell_len(said) + 3 + cell_len(part) <= width:
            said += f" · {part}"
    return Text(shorten(said, width), style="bold", no_wrap=True)


def _notes(state: MeshState) -> list[_Note]:
    """Why nodes are not healthy, then the findings that say more than that."""
    notes: list[_Note] = []
    said: set[tuple[str | None, str]] = set()
    for node in state.nodes:
        if node.reason is None:
            continue
        said.add((node.name, node.reason))
        if node.tunnel.error_code is not None:
            said.add((node.name, node.tunnel.error_code))
        text = Text.assemble((clean_line(node.name, 60), "bold"), f" {node.health}: {clean_line(node.reason, 400)}")
        if node.tunnel.retry_in_s is not None and node.tunnel.state is not TunnelPhase.UP:
            text.append(f" (again in {format_duration(node.tunnel.retry_in_s)})", style="dim")
        add_hint(text, _hint_for(node, state))
        notes.append((Text(MARKS[node.health], style=STYLES[node.health]), text))
    alike: dict[Finding, list[str]] = {}
    for finding in state.findings:
        if (finding.node, finding.message) in said or (finding.node, finding.code) in said:
            continue
        if finding.nodes or finding.node is None:  # about several as one
            alike[finding] = []
        else:
            alike.setdefault(replace(finding, node=None), []).append(finding.node)
    for finding, names in alike.items():
        told = replace(finding, node=_list_of(names)) if names else finding
        notes.append((Text(*SEVERITIES[finding.severity]), finding_text(told)))
    return notes


def _list_of(names: Sequence[str]) -> str:
    """What is the same for many nodes is said once, with as many of their names as can be read at a glance."""
    few = [clean_line(name, 60) for name in names[:MAX_NAMED_NODES]]
    return ", ".join(few) + (f" and {len(names) - MAX_NAMED_NODES} more" if len(names) > MAX_NAMED_NODES else "")


def _hint_for(node: NodeState, state: MeshState) -> str | None:
    """What to do about a node's reason: its tunnel's own hint, else that of the finding that says the same."""
    if node.tunnel.state is not TunnelPhase.UP:
        return node.tunnel.hint
    return next((each.hint for each in state.findings if each.node == node.name and each.message == node.reason), None)


def _processes(state: MeshState) -> Iterator[RenderableType]:
    """Who uses the GPUs, the largest first."""
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
