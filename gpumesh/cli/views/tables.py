"""Tables, findings and progress bars, for every command. What came from a host is cleaned here, and reaches rich as
``Text``, never as markup. The table of `status` is status_table.py, what moves is live_table.py and demo_story.py."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gpumesh.cli.text import UNKNOWN, clean_line
from gpumesh.state import Finding, Severity

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PIPED_WIDTH = 160
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
        "─": "-",
        "│": "|",
        "├": "+",
        "└": "+",
        "·": "|",
        "→": ">",
        "↻": "x",
        "…": "~",
        "°": "C",
        "∞": "*",
        "▁": "_",
        "▂": ".",
        "▃": ":",
        "▄": "-",
        "▅": "=",
        "▆": "+",
        "▇": "*",
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


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table that must fit. ``rank``: which go first when there is room for few, 0 always stays;
    ``min_width``: how narrow it may become. One that says nothing goes, unless its rank is 2 or less."""

    title: str
    rank: int = 0
    right: bool = False
    min_width: int | None = None


def print_fitted_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]]) -> None:
    """As many of the columns as there is room for."""
    out = console()
    cells = [[_text(cell) for cell in row] for row in rows]
    print_plain(out, fit_table([(column, [row[n] for row in cells]) for n, column in enumerate(columns)], out.width))


def fit_table(columns: Sequence[tuple[Column, Sequence[Text]]], width: int, *, styles: Sequence[str] = ()) -> Table:
    """A table of the columns for which there is room, the most important first, in their order. ``styles`` of rows."""
    chosen = _chosen(columns, width)
    table = new_table()
    for place in sorted(chosen):
        column = columns[place][0]
        side: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.title, justify=side, no_wrap=True, overflow="ellipsis", width=chosen[place])
    for number, line in enumerate(zip(*(columns[place][1] for place in sorted(chosen)), strict=True)):
        if any(cell.plain for cell in line):  # not a row of which nothing is left
            table.add_row(*line, style=styles[number] if styles else "")
    return table


def _chosen(columns: Sequence[tuple[Column, Sequence[Text]]], width: int) -> dict[int, int]:
    """The places of the columns that fit, with their widths. First each gets the least that it needs, by rank; what is
    left then goes to those that would like more, in the same order."""
    by_rank = sorted(enumerate(columns), key=lambda item: item[1][0].rank)
    left = width
    chosen: dict[int, int] = {}
    wishes: dict[int, int] = {}
    for place, (column, cells) in by_rank:
        if column.rank > 2 and all(cell.plain in ("", UNKNOWN) for cell in cells):
            continue
        wishes[place] = max([cell_len(column.title), *(cell.cell_len for cell in cells)])
        gap = 2 if chosen else 0
        least = wishes[place] if column.min_width is None else min(wishes[place], column.min_width)
        if gap + least > left and column.rank > 0:
            continue
        chosen[place] = min(least, max(left - gap, 1))
        left -= gap + chosen[place]
    for place, _ in by_rank:
        if place in chosen:
            more = min(wishes[place] - chosen[place], max(left, 0))
            chosen[place] += more
            left -= more
    return chosen


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Cell | str]], *, wrap: bool = False) -> None:
    """A plain table; ``wrap`` breaks long cells into lines instead of shortening them."""
    out = console()
    table = new_table()
    for title in titles:
        table.add_column(title, no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    print_plain(out, table)


def _text(cell: Cell | str) -> Text:
    if isinstance(cell, str):
        return Text(clean_line(cell))
    return Text(clean_line(cell.text), style=cell.style)


def new_table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold dim")


def print_plain(out: Console, view: RenderableType) -> None:
    """Without the blanks that rich pads lines with, and in plain signs where the stream cannot carry others."""
    out.file.write("\n".join(render_lines(out, view)) + "\n")


def render_lines(out: Console, view: RenderableType) -> list[str]:
    """What ``out`` would show, colours included where it has them."""
    with out.capture() as captured:
        out.print(view)
    text = captured.get().removesuffix("\n")
    return [line.rstrip(" ") for line in (text if _carries(out) else text.translate(_PLAIN)).split("\n")]


def _carries(out: Console) -> bool:
    try:
        "●█░…▁".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


# -- findings --------------------------------------------------------------------------------------------------------


def print_findings(findings: Sequence[Finding]) -> None:
    out = console()
    if not findings:
        print_plain(out, Text("no findings", style="green"))
        return
    print_plain(
        out, make_notes_table([(Text(*SEVERITIES[finding.severity]), finding_text(finding)) for finding in findings])
    )


def make_notes_table(notes: Sequence[tuple[Text, Text]]) -> Table:
    """A mark and what it marks, line by line."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for mark, text in notes:
        table.add_row(mark, text)
    return table


def finding_text(finding: Finding) -> Text:
    where = ", ".join(finding.nodes) or finding.node
    text = Text()
    if where:
        text.append(f"{clean_line(where, 200)} ", style="bold")
    text.append(f"{clean_line(finding.code, 40)}: {clean_line(finding.message, 400)}")
    add_hint(text, finding.hint)
    return text


def add_hint(text: Text, hint: str | None) -> None:
    if hint:
        text.append(f"\n→ {clean_line(hint, 400)}", style="dim")


# -- progress --------------------------------------------------------------------------------------------------------


class ProgressDisplay(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...

    def write(self, line: str) -> None:
        """A result, to stdout."""
        ...


class _NoBar:
    def __call__(self, done: int, note: str = "") -> None: ...

    def write(self, line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


class _Bar(_NoBar):
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def __call__(self, done: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, note=clean_line(note, 60))

    def write(self, line: str) -> None:
        write_above_bars(self._bar, line)


def write_above_bars(bars: Progress, line: str) -> None:
    """A result while bars are shown on stderr: to stdout, or above them where both are the same terminal."""
    if sys.stdout.isatty():
        bars.console.print(Text(line), soft_wrap=True)
    else:
        _NoBar().write(line)


@contextmanager
def show_progress(total: int, title: str, *, quiet: bool) -> Iterator[ProgressDisplay]:
    """A bar on stderr; on something that is no terminal nothing at all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    if quiet or not out.is_terminal:
        yield _NoBar()
        return
    said = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False)
    columns = (said[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said[1])
    # rich would take what is written to stdout for its own, and results would go to the terminal, not into the file.
    with Progress(*columns, console=out, transient=True, redirect_stdout=False) as bar:
        yield _Bar(bar, bar.add_task(title, total=total, note=""))
