"""Prints the output of `audit`: the comparison as a table or, on a narrow terminal, as a list; then the drawing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpumesh.cli.views import tables
from gpumesh.cli.views.audit_rows import AS_EXPECTED, ROUTE, SERVER, ComparisonRow, MachineBranch
from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.figures import UNKNOWN
from gpumesh.cli.views.findings import SEVERITY_MARKS
from gpumesh.cli.views.safe_text import clean_line

MIN_TABLE_WIDTH = 110  # columns of the terminal; the six columns of the table do not fit into fewer
_WORD = re.compile(r"(?P<word>\S+)(?P<blanks>\s*)")
SHORT_CELL = 28  # characters
UNBROKEN_TITLES = ("WHAT", "VERDICT")  # of columns whose cells have one line
TITLES = ("NODE", "WHAT", "EXPECTED", "FOUND", "VERDICT", "WHAT TO DO")


def print_comparison(rows: Sequence[ComparisonRow]) -> None:
    """Prints what mesh.yaml expects of each node beside what was found."""
    out = console()
    cells = list(_table_cells(rows))
    widths = fit_words(cells, out.width) if out.width >= MIN_TABLE_WIDTH else None
    if widths is None:
        print_plain(out, _comparison_list(rows, out), soft_wrap=True)
    else:
        print_plain(out, _comparison_table(cells, widths))


def print_drawing(branches: Sequence[MachineBranch]) -> None:
    """Prints the topology as a tree: each machine, and below it its nodes with their routes."""
    out = console()
    for branch in branches:
        mark = Text("●", "green") if branch.reached else Text("✗", "red")
        title = Text(clean_line(branch.title), "bold")
        if branch.remark:
            title.append(f"  {branch.remark}", "not bold yellow")
        title_line = Table.grid(padding=(0, 1))
        title_line.add_row(mark, title)
        print_plain(out, title_line)
        print_plain(out, _branch_lines(branch))


def _branch_lines(branch: MachineBranch) -> Table:
    """The lines below a machine: the line of the tree, the node's name, and the route."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    # Lines without a node are further routes of the node above, and get no sign of their own.
    last_node_index = max((index for index, line in enumerate(branch.lines) if line.node), default=0)
    for index, line in enumerate(branch.lines):
        if index > last_node_index:
            tree_sign = " "  # another route of the last node
        elif index == last_node_index:
            tree_sign = "└"
        else:
            tree_sign = "├" if line.node else "│"
        route = Text(clean_line(line.route), "dim" if line.dim else "")
        if line.remark:
            route.append(f"  {clean_line(line.remark, 200)}", "dim" if line.dim else "cyan")
        table.add_row(tree_sign, Text(clean_line(line.node, 24), "bold"), route)
    return table


def _table_cells(rows: Sequence[ComparisonRow]) -> Iterator[tuple[Text, ...]]:
    """Yields the six cells of each row. A node's name stands in its first row only."""
    last_node = None
    for row in rows:
        node = "" if row.node == last_node else clean_line(row.node, 40)
        yield (
            Text(node, "bold"),
            *(Text(clean_line(text, 400)) for text in (row.name, row.expected, row.found)),
            Text(clean_line(row.verdict), _verdict_style(row)),
            Text(clean_line(row.todo or "", 400), "dim"),
        )
        last_node = row.node


def fit_words(rows: Sequence[Sequence[Text]], width: int) -> list[int] | None:
    """The widths of the columns with which no word is broken: a path, a URL or a fingerprint could not be copied then.
    ``None`` if the words do not fit into ``width``."""
    columns = [[Text(title), *cells] for title, *cells in zip(TITLES, *rows, strict=True)]
    full_widths = [max(cell.cell_len for cell in cells) for cells in columns]
    for short_width in (SHORT_CELL, 0):  # if there is room for it, short cells such as an address have one line
        widths = [
            full_width
            if title in UNBROKEN_TITLES
            else max(len(title), min(full_width, short_width), *map(_longest_word, cells))
            for title, full_width, cells in zip(TITLES, full_widths, columns, strict=True)
        ]
        free_width = width - sum(widths) - 2 * (len(widths) - 1)  # two blanks between columns
        if free_width >= 0:
            break
    else:
        return None
    for _ in range(free_width):  # the column that would have the most lines gets the next character
        position = max(range(len(widths)), key=lambda position: full_widths[position] / widths[position])
        if widths[position] >= full_widths[position]:
            break
        widths[position] += 1
    return widths


def _longest_word(cell: Text) -> int:
    """The width of the longest word of a cell."""
    return max(map(cell_len, cell.plain.split()), default=0)


def _comparison_table(rows: Sequence[Sequence[Text]], widths: Sequence[int]) -> Table:
    """The comparison in six columns of these widths."""
    table = tables.new_table()
    for title, width in zip(TITLES, widths, strict=True):
        table.add_column(title, overflow="fold", no_wrap=title in UNBROKEN_TITLES, width=width)
    for row in rows:
        table.add_row(*row)
    return table


def _comparison_list(rows: Sequence[ComparisonRow], out: Console) -> Text:
    """The comparison as a list: a line with the name of each node, and below it a mark and a text for each row. A word
    that is longer than the terminal is wide is left to the terminal, which can select it as one word."""
    items: list[tuple[Text, Text]] = []
    last_node = None
    for row in rows:
        if row.node != last_node:
            items.append((Text(" "), Text(clean_line(row.node, 60), "bold")))
        last_node = row.node
        items.append((_severity_mark(row), Text.assemble(*_list_item_parts(row))))
    lines = []
    for mark, text in items:
        for number, line in enumerate(_wrap_between_words(text, out.width - 2)):
            lines.append(Text.assemble(mark if number == 0 else " ", " ", line))
    return Text("\n").join(lines)


def _wrap_between_words(text: Text, width: int) -> Iterator[Text]:
    """Yields the lines of a text. Only a line of a single word may be longer than ``width``. (rich breaks such a word,
    or does not wrap at all.)"""
    for paragraph in text.split("\n"):
        line_starts: list[int] = []
        used_width = 0
        for match in _WORD.finditer(paragraph.plain):
            word_width = cell_len(match["word"])
            if used_width and used_width + word_width > width:
                line_starts.append(match.start())
                used_width = 0
            used_width += word_width + len(match["blanks"])
        for line in paragraph.divide(line_starts):
            line.rstrip()
            yield line


def _list_item_parts(row: ComparisonRow) -> Iterator[tuple[str, str]]:
    """Yields pairs of text and style, which together are the text of one row. The style "" is the usual one."""
    expected, found = clean_line(row.expected, 400), clean_line(row.found, 400)
    yield f"{clean_line(row.name, 40)}: ", ""
    if row.expected == UNKNOWN:  # the row of a finding: mesh.yaml expects nothing
        yield found, ""
    elif row.found == UNKNOWN:
        yield expected, ""
    elif row.verdict == AS_EXPECTED:
        yield expected, ""
        if row.found != row.expected:
            yield f" ({found})", "dim"
    elif row.name in (ROUTE, SERVER):
        yield f"{expected}: {found}", ""
    else:
        yield f"expected {expected}, found {found}", ""
    if row.verdict not in (AS_EXPECTED, row.name):  # a verdict that equals the row's name would only repeat it
        yield f" [{clean_line(row.verdict)}]", _verdict_style(row)
    if row.todo:
        yield f"\n→ {clean_line(row.todo, 400)}", "dim"


def _severity_mark(row: ComparisonRow) -> Text:
    """The mark before a row of the list: by the finding's severity, else whether all is as expected or not known."""
    if row.severity is not None:
        return Text(*SEVERITY_MARKS[row.severity])
    return Text("●", "green") if row.verdict == AS_EXPECTED else Text("?", "dim")


def _verdict_style(row: ComparisonRow) -> str:
    """The style of the verdict for rich: by the finding's severity, else green if all is as expected."""
    if row.severity is not None:
        _, style = SEVERITY_MARKS[row.severity]
        return style
    return "green" if row.verdict == AS_EXPECTED else "dim"
