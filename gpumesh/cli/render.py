"""How things look: the only file that knows rich. Everything that came from a host is cleaned here, and reaches rich as
``Text``, never as markup."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpumesh.cli.text import UNKNOWN, clean_line, clean_text, duration, gib, milliseconds, short_gpu, shorten, time_left
from gpumesh.state import (
    BackendPhase,
    Finding,
    GpuState,
    Health,
    LoadedModel,
    MeshState,
    NodeState,
    Severity,
    TunnelPhase,
    TunnelState,
)

if TYPE_CHECKING:
    from rich.live import Live

PIPED_WIDTH = 160
MARKS = {Health.HEALTHY: "●", Health.DEGRADED: "◐", Health.DOWN: "✗", Health.DRAINING: "‖", Health.UNKNOWN: "?"}
STYLES = {
    Health.HEALTHY: "green",
    Health.DEGRADED: "yellow",
    Health.DOWN: "red",
    Health.DRAINING: "cyan",
    Health.UNKNOWN: "dim",
}
SEVERITIES = {Severity.ERROR: ("✗", "red"), Severity.WARNING: ("!", "yellow"), Severity.INFO: ("i", "cyan")}
# Signs beyond ASCII, for terminals and pipes that cannot carry them.
_PLAIN = str.maketrans(
    {
        "●": "*",
        "◐": "~",
        "✗": "x",
        "‖": "-",
        "█": "#",
        "░": ".",
        UNKNOWN: "-",
        "·": "|",
        "→": ">",
        "…": "~",
        "°": "C",
        "∞": "*",
    }
)


def console(*, stderr: bool = False) -> Console:
    """For results (stdout) or for remarks and progress (stderr). Colours only on terminals, never with NO_COLOR."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((PIPED_WIDTH, 50)).columns
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


# -- a table of anything ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """``text`` may be hostile: it is cleaned when it is drawn."""

    text: str
    style: str = ""


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Cell | str]], *, wrap: bool = False) -> None:
    """A plain table; ``wrap`` breaks long cells into lines instead of shortening them."""
    out = console()
    table = _new_table()
    for title in titles:
        table.add_column(title, no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    _print(out, table)


def _text(cell: Cell | str) -> Text:
    if isinstance(cell, str):
        return Text(clean_line(cell))
    return Text(clean_line(cell.text), style=cell.style)


def _new_table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold dim")


def _print(out: Console, view: RenderableType) -> None:
    """Without the blanks that rich pads lines with, and in plain signs where the stream cannot carry others."""
    if out.is_terminal and _carries(out):
        out.print(view)
        return
    with out.capture() as captured:
        out.print(view)
    lines = captured.get().splitlines()
    text = "\n".join(line.rstrip() for line in lines)
    out.file.write((text if _carries(out) else text.translate(_PLAIN)) + "\n")


def _carries(out: Console) -> bool:
    try:
        "●█░…".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


# -- status ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    node: NodeState
    gpu: GpuState | None
    first: bool
    at: datetime


@dataclass(frozen=True, slots=True)
class _Column:
    """``rank``: which columns go first when there is room for few; ``least``: how narrow it may become."""

    title: str
    rank: int
    cell: Callable[[_Row, int], Text]
    right: bool = False
    least: int | None = None


def print_status(state: MeshState, *, verbose: bool = False) -> None:
    out = console()
    _print(out, status_view(state, out.width, verbose=verbose))


def status_view(state: MeshState, width: int, *, verbose: bool = False, height: int | None = None) -> RenderableType:
    """The whole of `status`. With ``height`` (a screen that cannot scroll) rows are left out, the healthy ones first,
    and said to be."""
    notes = _notes(state, width)
    rows = [row for node in state.nodes for row in _rows(node, state.at)]
    left_out = 0
    if height is not None and len(rows) + len(notes) + 5 > height:
        notes = notes[: max(height // 3, 2)]
        room = max(height - len(notes) - 6, 1)
        worst = {Health.DOWN: 0, Health.DEGRADED: 1, Health.UNKNOWN: 2, Health.DRAINING: 3, Health.HEALTHY: 4}
        keep = {id(row) for row in sorted(rows, key=lambda row: worst[row.node.health])[:room]}
        left_out = len(rows) - len(keep)
        rows = [row for row in rows if id(row) in keep]
    parts: list[RenderableType] = [_head(state, width), _status_table(rows, width)]
    if left_out:
        parts.append(Text(f"… and {left_out} more rows", style="dim"))
    parts.append(_totals(state, width))
    if verbose:
        parts.extend(_processes(state))
    if notes:
        parts.append(_grid(notes))
    return Group(*parts)


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


def _rows(node: NodeState, at: datetime) -> Iterator[_Row]:
    gpus: tuple[GpuState | None, ...] = node.gpus or (None,)
    for position, gpu in enumerate(gpus):
        yield _Row(node, gpu, position == 0, at)


def _status_table(rows: Sequence[_Row], width: int) -> Table:
    chosen = _fitting(rows, width)
    table = _new_table()
    for column, cells, room in chosen:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=min(room, max([cell_len(column.title), *(cell.cell_len for cell in cells)])),
        )
    for line in zip(*(cells for _, cells, _ in chosen), strict=True):
        table.add_row(*line)
    return table


def _fitting(rows: Sequence[_Row], width: int) -> list[tuple[_Column, list[Text], int]]:
    """The columns that there is room for, the most important first, in their order on the screen, with their widths."""
    bar = 4 if width < 80 else 6 if width < 110 else 8 if width < 150 else 14
    left = width
    chosen: list[tuple[int, _Column, list[Text], int]] = []
    for place, column in sorted(enumerate(COLUMNS), key=lambda item: item[1].rank):
        cells = [column.cell(row, bar) for row in rows]
        if all(cell.plain in ("", UNKNOWN) for cell in cells) and column.rank > 2:
            continue
        wanted = max([cell_len(column.title), *(cell.cell_len for cell in cells)])
        gap = 2 if chosen else 0
        least = wanted if column.least is None else min(wanted, column.least)
        if gap + least > left and column.rank > 0:
            continue
        room = min(wanted, max(left - gap, 1))
        left -= gap + room
        chosen.append((place, column, cells, room))
    return [(column, cells, room) for _, column, cells, room in sorted(chosen, key=lambda item: item[0])]


def _of_node(cell: Callable[[NodeState, datetime], Text | str]) -> Callable[[_Row, int], Text]:
    """A column that says something about the node: once, in its first row."""

    def draw(row: _Row, _bar: int) -> Text:
        said = cell(row.node, row.at) if row.first else ""
        return said if isinstance(said, Text) else Text(said)

    return draw


def _of_gpu(cell: Callable[[GpuState], Text | str]) -> Callable[[_Row, int], Text]:
    def draw(row: _Row, _bar: int) -> Text:
        said = UNKNOWN if row.gpu is None else cell(row.gpu)
        return said if isinstance(said, Text) else Text(said)

    return draw


def _name(node: NodeState, _at: datetime) -> Text:
    return Text.assemble((MARKS[node.health], STYLES[node.health]), " ", (clean_line(node.name, 24), "bold"))


def _gpu_name(row: _Row, _bar: int) -> Text:
    if row.gpu is None:
        none = row.node.gpus is not None
        return Text("none" if none else UNKNOWN, style="dim")
    name = short_gpu(clean_line(row.gpu.name, 40))
    several = row.node.gpus is not None and len(row.node.gpus) > 1
    return Text(f"{row.gpu.index} {name}" if several else name)


def bar_text(part: float | None, length: int, low: float, high: float) -> Text:
    """``part`` of 1 as a bar; green below ``low``, red above ``high`` (nvitop's thresholds)."""
    if part is None:
        return Text("░" * length, style="dim")
    part = min(max(part, 0.0), 1.0)
    full = round(part * length)
    if part > 0 and full == 0:
        full = 1
    style = "green" if part < low else "yellow" if part < high else "red"
    return Text.assemble(("█" * full, style), ("░" * (length - full), "dim"))


def _memory(row: _Row, bar: int) -> Text:
    gpu = row.gpu
    if gpu is None or gpu.memory_total_mib is None:
        return Text(UNKNOWN)
    used = gpu.memory_used_mib
    part = None if used is None or not gpu.memory_total_mib else used / gpu.memory_total_mib
    return bar_text(part, bar, 0.10, 0.80).append(f" {gib(used):>4}/{gib(gpu.memory_total_mib)}")


def _utilization(row: _Row, bar: int) -> Text:
    if row.gpu is None or row.gpu.utilization_pct is None:
        return Text(UNKNOWN)
    percent = row.gpu.utilization_pct
    return bar_text(percent / 100, bar, 0.10, 0.75).append(f" {percent:>3}%")


def _temperature(gpu: GpuState) -> Text | str:
    if gpu.temperature_c is None:
        return UNKNOWN
    return Text(f"{gpu.temperature_c}°", style="red" if gpu.temperature_c >= 83 else "")


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
    words = clean_line(model.name, 40)
    if model.size_mib and model.size_vram_mib is not None and model.size_vram_mib < model.size_mib:
        words += f" ({100 - round(100 * model.size_vram_mib / model.size_mib)}% CPU)"
    left = time_left(model.expires_at, at)
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
        said += f" {duration((at - tunnel.since).total_seconds())}"
    return said + (f" ↻{tunnel.reconnects}" if tunnel.reconnects else "")


def _backend(node: NodeState, _at: datetime) -> str:
    if node.backend.state is not BackendPhase.UP:
        return f"{clean_line(node.backend.kind, 10)} {node.backend.state}"
    return f"{clean_line(node.backend.kind, 10)} {clean_line(node.backend.version or '', 20)}".rstrip()


# In their order on the screen.
COLUMNS = (
    _Column("NODE", 0, _of_node(_name), least=8),
    _Column("HEALTH", 1, _of_node(lambda node, _: Text(str(node.health), style=STYLES[node.health]))),
    _Column("GPU", 4, _gpu_name, least=8),
    _Column("MEMORY GiB", 2, _memory),
    _Column("UTIL", 3, _utilization),
    _Column("TEMP", 7, _of_gpu(_temperature), right=True),
    _Column("POWER", 10, _of_gpu(_power), right=True),
    _Column("LOADED", 8, _of_node(_models), least=14),
    _Column("TOK/S", 6, _of_node(_rate), right=True),
    _Column("BUSY", 5, _of_node(_in_flight), right=True),
    _Column("RTT", 9, _of_node(lambda node, _: milliseconds(node.tunnel.rtt_ms)), right=True),
    _Column("TUNNEL", 11, _of_node(lambda node, at: _tunnel(node.tunnel, at))),
    _Column("BACKEND", 12, _of_node(_backend)),
    _Column("SERVED", 13, _of_node(lambda node, _: str(node.load.served)), right=True),
)


def _totals(state: MeshState, width: int) -> Text:
    totals = state.totals
    parts = [f"{totals.nodes_up} of {totals.nodes} nodes up"]
    if totals.gpus is not None:
        parts.append(f"{totals.gpus} GPU{'' if totals.gpus == 1 else 's'}")
    if totals.vram_total_mib is not None:
        parts.append(f"{gib(totals.vram_free_mib)} of {gib(totals.vram_total_mib)} GiB free")
    parts.append(f"{totals.tokens_per_s:.0f} tok/s")
    parts.append(f"{state.gateway.in_flight} in flight")
    if state.gateway.queued:
        parts.append(f"{state.gateway.queued} queued")
    text = " · ".join(parts)
    return Text(shorten(text, width), style="bold", no_wrap=True)


def _notes(state: MeshState, width: int) -> list[tuple[Text, Text]]:
    """Why nodes are not healthy, then the findings that say more than that."""
    notes: list[tuple[Text, Text]] = []
    said: set[tuple[str | None, str]] = set()
    for node in state.nodes:
        if node.reason is None:
            continue
        said.add((node.name, node.reason))
        if node.tunnel.error_code is not None:
            said.add((node.name, node.tunnel.error_code))
        text = Text.assemble((clean_line(node.name, 24), "bold"), f" {node.health}: {clean_line(node.reason, 400)}")
        if node.tunnel.retry_in_s is not None and node.tunnel.state is not TunnelPhase.UP:
            text.append(f" (again in {duration(node.tunnel.retry_in_s)})", style="dim")
        _add_hint(text, node.tunnel.hint if node.tunnel.state is not TunnelPhase.UP else None)
        notes.append((Text(MARKS[node.health], style=STYLES[node.health]), text))
    for finding in state.findings:
        if (finding.node, finding.message) not in said and (finding.node, finding.code) not in said:
            notes.append((Text(*SEVERITIES[finding.severity]), finding_text(finding)))
    return notes if width >= 20 else []


def print_findings(findings: Sequence[Finding]) -> None:
    out = console()
    if not findings:
        _print(out, Text("no findings", style="green"))
        return
    _print(out, _grid([(Text(*SEVERITIES[finding.severity]), finding_text(finding)) for finding in findings]))


def _grid(notes: Sequence[tuple[Text, Text]]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for mark, text in notes:
        grid.add_row(mark, text)
    return grid


def finding_text(finding: Finding) -> Text:
    where = ", ".join(finding.nodes) or finding.node
    text = Text()
    if where:
        text.append(f"{clean_line(where, 60)} ", style="bold")
    text.append(f"{clean_line(finding.code, 40)}: {clean_line(finding.message, 400)}")
    _add_hint(text, finding.hint)
    return text


def _add_hint(text: Text, hint: str | None) -> None:
    if hint:
        text.append(f"\n→ {clean_line(hint, 400)}", style="dim")


def _processes(state: MeshState) -> Iterator[Table]:
    rows = [
        (node.name, gpu.index, process) for node in state.nodes for gpu in node.gpus or () for process in gpu.processes
    ]
    if not rows:
        return
    table = _new_table()
    for title in ("NODE", "GPU", "PID", "PROCESS", "MiB"):
        table.add_column(
            title, no_wrap=True, overflow="ellipsis", justify="right" if title in ("PID", "MiB") else "left"
        )
    for name, index, process in rows:
        memory = UNKNOWN if process.used_memory_mib is None else str(process.used_memory_mib)
        cells = (clean_line(name, 24), str(index), str(process.pid), clean_line(process.name, 60), memory)
        table.add_row(*(Text(cell) for cell in cells))
    yield table


# -- what moves ------------------------------------------------------------------------------------------------------


async def show_live(states: AsyncIterator[MeshState], *, verbose: bool, footer: str) -> MeshState | None:
    """Redraws the table for each state on a terminal's second screen, which is put away again at the end, however it
    comes. Returns the last state."""
    from rich.live import Live

    out = console()
    last: MeshState | None = None
    with Live(console=out, screen=True, auto_refresh=False) as live:
        async for state in states:
            last = state
            size = out.size
            view = status_view(state, size.width, verbose=verbose, height=size.height - 1)
            live.update(Group(view, Text(shorten(footer, size.width), style="dim")), refresh=True)
    return last


class Ticker(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


def _nowhere(done: int, note: str = "") -> None:
    del done, note


@contextmanager
def progress(total: int, title: str, *, quiet: bool) -> Iterator[Ticker]:
    """A bar on stderr; on something that is no terminal nothing at all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    if quiet or not out.is_terminal:
        yield _nowhere
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=out, transient=True) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=clean_line(note, 60))


class Scene:
    """A story told line by line above a table that lives; without a terminal only what is told, and the table where
    ``picture`` asks for it."""

    def __init__(self) -> None:
        self._out = console()
        self._live: Live | None = None

    def __enter__(self) -> Scene:
        from rich.live import Live

        if self._out.is_terminal:
            self._live = Live(console=self._out, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def update(self, state: MeshState) -> None:
        if self._live is not None:
            size = self._out.size
            view = status_view(state, size.width, height=max(size.height - 4, 8))
            self._live.update(Group(Text(""), view), refresh=True)

    def picture(self, state: MeshState) -> None:
        if self._live is None:
            _print(self._out, status_view(state, self._out.width))
            self._out.file.flush()
        else:
            self.update(state)

    def say(self, text: str, style: str = "") -> None:
        line = Text(clean_text(text), style=style)
        if self._live is not None:
            self._live.console.print(line)
        else:
            _print(self._out, line)
            self._out.file.flush()
