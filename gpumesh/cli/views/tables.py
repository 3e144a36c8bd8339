"""Tables for every command: a plain table, and a table that drops and narrows columns until it fits the width.

Cells may hold text from a host. It is cleaned here and reaches rich as ``Text``, never as markup. The table of `status`
is in ``status/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.figures import UNKNOWN
from gpumesh.cli.views.safe_text import clean_line


@dataclass(frozen=True, slots=True)
class Cell:
    """``text`` may be hostile: it is cleaned when it is drawn."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table that must fit the width. Columns with a low ``rank`` are placed first; rank 0 always stays.
    ``min_width``: how narrow the column may become. An empty column is left out, unless its rank is
    MAX_RANK_WHEN_EMPTY or less."""

    title: str
    rank: int = 0
    right: bool = False
    min_width: int | None = None


MAX_RANK_WHEN_EMPTY = 2  # up to this rank a column stays although all its cells are empty

ColumnCells = tuple[Column, Sequence[Text]]


def print_fitted_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]]) -> None:
    """Prints as many of the columns as there is room for."""
    out = console()
    cells = [[_cell_text(cell) for cell in row] for row in rows]
    print_plain(out, fit_table([(column, [row[n] for row in cells]) for n, column in enumerate(columns)], out.width))


def fit_table(columns: Sequence[ColumnCells], width: int, *, styles: Sequence[str] = ()) -> Table:
    """A table of the columns that fit, chosen by rank and shown in their given order. ``styles`` are those of rows."""
    widths = _choose_widths(columns, width)
    table = new_table()
    for position in sorted(widths):
        column = columns[position][0]
        side: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.title, justify=side, no_wrap=True, overflow="ellipsis", width=widths[position])
    for number, line in enumerate(zip(*(columns[position][1] for position in sorted(widths)), strict=True)):
        if any(cell.plain for cell in line):  # a row whose cells are all left out is left out too
            table.add_row(*line, style=styles[number] if styles else "")
    return table


def _choose_widths(columns: Sequence[ColumnCells], width: int) -> dict[int, int]:
    """Position -> width, for the columns that fit. First the columns get their least widths, in the order of
    their ranks. Then the rest of the width goes to the columns that want more, in the same order."""
    by_rank = sorted(enumerate(columns), key=lambda numbered: numbered[1][0].rank)
    free_width = width
    widths: dict[int, int] = {}
    full_widths: dict[int, int] = {}
    for position, (column, cells) in by_rank:
        if column.rank > MAX_RANK_WHEN_EMPTY and all(cell.plain in ("", UNKNOWN) for cell in cells):
            continue
        full_widths[position] = max([cell_len(column.title), *(cell.cell_len for cell in cells)])
        gap = 2 if widths else 0  # blanks between two columns
        least_width = (
            full_widths[position] if column.min_width is None else min(full_widths[position], column.min_width)
        )
        if gap + least_width > free_width and column.rank > 0:
            continue
        widths[position] = min(least_width, max(free_width - gap, 1))
        free_width -= gap + widths[position]
    for position, _ in by_rank:
        if position in widths:
            extra_width = min(full_widths[position] - widths[position], max(free_width, 0))
            widths[position] += extra_width
            free_width -= extra_width
    return widths


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Cell | str]], *, wrap: bool = False) -> None:
    """Prints a plain table. ``wrap`` breaks long cells into lines instead of shortening them."""
    out = console()
    table = new_table()
    for title in titles:
        table.add_column(title, no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")
    for row in rows:
        table.add_row(*(_cell_text(cell) for cell in row))
    print_plain(out, table)


def _cell_text(cell: Cell | str) -> Text:
    if isinstance(cell, str):
        return Text(clean_line(cell))
    return Text(clean_line(cell.text), style=cell.style)


def new_table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold dim")
