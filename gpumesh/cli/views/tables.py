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
    """A cell and its style for rich, as ``bold red``. ``text`` may be hostile: it is cleaned when it is drawn."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table that must fit the width.

    - ``rank``: columns with a low rank get their place first; a column of rank 0 always stays. An empty column is left
      out, unless its rank is MAX_RANK_WHEN_EMPTY or less.
    - ``right``: the cells are aligned on the right.
    - ``min_width``: how narrow the column may become, in characters; ``None`` if it must not be narrowed.
    - ``only_after``: the title of a column that must have its place first. Where there is no room for that column, this
      column is left out too, although it may be narrower.
    """

    title: str
    rank: int = 0
    right: bool = False
    min_width: int | None = None
    only_after: str | None = None


MAX_RANK_WHEN_EMPTY = 2  # up to this rank a column stays although all its cells are empty

ColumnCells = tuple[Column, Sequence[Text]]
"""A column, then its cells from the first row to the last."""


def print_fitted_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]], *, wide: bool = False) -> None:
    """Prints as many of the columns as there is room for; with ``wide`` all of them. A row has a cell for each
    column."""
    out = console(wide=wide)
    text_rows = [[_cell_text(cell) for cell in row] for row in rows]
    columns_with_cells = [(column, [row[index] for row in text_rows]) for index, column in enumerate(columns)]
    print_plain(out, fit_table(columns_with_cells, out.width))


def fit_table(columns: Sequence[ColumnCells], width: int, *, styles: Sequence[str] = ()) -> Table:
    """A table of the columns that fit into ``width`` characters, chosen by rank and shown in their given order.
    ``styles``: the style of each row."""
    widths = _choose_widths(columns, width)
    table = new_table()
    shown_cells: list[Sequence[Text]] = []
    for position in sorted(widths):
        column, cells = columns[position]
        side: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.title, justify=side, no_wrap=True, overflow="ellipsis", width=widths[position])
        shown_cells.append(cells)
    for number, row in enumerate(zip(*shown_cells, strict=True)):
        if any(cell.plain for cell in row):  # a row of which no text is shown is left out too
            table.add_row(*row, style=styles[number] if styles else "")
    return table


def _choose_widths(columns: Sequence[ColumnCells], width: int) -> dict[int, int]:
    """The widths of the columns that fit, by the column's position. First each column gets its least width, in the
    order of the ranks; a column that does not fit any more is left out. Then the rest of the width goes to the columns
    that want more, in the same order."""
    ranks = [column.rank for column, _ in columns]
    by_rank = sorted(range(len(columns)), key=lambda position: ranks[position])
    free_width = width
    widths: dict[int, int] = {}
    full_widths: dict[int, int] = {}
    titles_without_room: set[str] = set()
    for position in by_rank:
        column, cells = columns[position]
        if column.rank > MAX_RANK_WHEN_EMPTY and all(cell.plain in ("", UNKNOWN) for cell in cells):
            continue
        full_width = max([cell_len(column.title), *(cell.cell_len for cell in cells)])
        least_width = full_width if column.min_width is None else min(full_width, column.min_width)
        gap = 2 if widths else 0  # blanks between two columns
        has_no_room = gap + least_width > free_width or column.only_after in titles_without_room
        if has_no_room and column.rank > 0:
            titles_without_room.add(column.title)
            continue
        full_widths[position] = full_width
        widths[position] = min(least_width, max(free_width - gap, 1))  # a column of rank 0 may get less than it needs
        free_width -= gap + widths[position]
    for position, full_width in full_widths.items():  # in the order of their ranks
        missing_width = full_width - widths[position]
        extra_width = min(missing_width, max(free_width, 0))
        widths[position] += extra_width
        free_width -= extra_width
    return widths


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Cell | str]], *, wrap: bool = False) -> None:
    """Prints a table of all columns, whatever the width. ``wrap`` breaks long cells into lines instead of shortening
    them."""
    out = console()
    table = new_table()
    for title in titles:
        table.add_column(title, no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")
    for row in rows:
        table.add_row(*(_cell_text(cell) for cell in row))
    print_plain(out, table)


def _cell_text(cell: Cell | str) -> Text:
    """The cell for rich, without anything that a terminal acts on."""
    if isinstance(cell, str):
        return Text(clean_line(cell))
    return Text(clean_line(cell.text), style=cell.style)


def new_table() -> Table:
    """An empty table in the style that all tables of the program have."""
    padding = (0, 1, 0, 0)  # above, on the right, below, on the left of each cell
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, header_style="bold dim")
