"""Prints the output of `audit`: the comparison as a table or, on a narrow terminal, as a list; then the drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from gpumesh.cli.views import tables
from gpumesh.cli.views.audit_rows import AS_EXPECTED, ROUTE, SERVER, ComparisonRow, MachineBranch
from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.figures import UNKNOWN
from gpumesh.cli.views.findings import SEVERITY_MARKS
from gpumesh.cli.views.safe_text import clean_line

MIN_TABLE_WIDTH = 110  # columns of the terminal; the six columns of the table do not fit into fewer
TITLES = ("NODE", "WHAT", "EXPECTED", "FOUND", "VERDICT", "WHAT TO DO")


def print_comparison(rows: Sequence[ComparisonRow]) -> None:
    """Prints what mesh.yaml expects of each node beside what was found."""
    out = console()
    print_plain(out, _comparison_table(rows) if out.width >= MIN_TABLE_WIDTH else _comparison_list(rows))


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


def _comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """The comparison in six columns. A node's name stands in its first row only."""
    table = tables.new_table()
    for title in TITLES:
        table.add_column(title, overflow="fold", no_wrap=title in ("WHAT", "VERDICT"), min_width=len(title))
    last_node = None
    for row in rows:
        node = "" if row.node == last_node else clean_line(row.node, 40)
        table.add_row(
            Text(node, "bold"),
            *(Text(clean_line(text, 400)) for text in (row.what, row.expected, row.found)),
            Text(clean_line(row.verdict), _verdict_style(row)),
            Text(clean_line(row.todo or "", 400), "dim"),
        )
        last_node = row.node
    return table


def _comparison_list(rows: Sequence[ComparisonRow]) -> Table:
    """The comparison as a list: a line with the name of each node, and below it a mark and a text for each row."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last_node = None
    for row in rows:
        if row.node != last_node:
            table.add_row(Text(""), Text(clean_line(row.node, 60), "bold"))
        last_node = row.node
        table.add_row(_severity_mark(row), Text.assemble(*_list_item_parts(row)))
    return table


def _list_item_parts(row: ComparisonRow) -> Iterator[tuple[str, str]]:
    """Yields pairs of text and style, which together are the text of one row. The style "" is the usual one."""
    expected, found = clean_line(row.expected, 400), clean_line(row.found, 400)
    yield f"{clean_line(row.what, 40)}: ", ""
    if row.expected == UNKNOWN:  # the row of a finding: mesh.yaml expects nothing
        yield found, ""
    elif row.found == UNKNOWN:
        yield expected, ""
    elif row.verdict == AS_EXPECTED:
        yield expected, ""
        if row.found != row.expected:
            yield f" ({found})", "dim"
    elif row.what in (ROUTE, SERVER):
        yield f"{expected}: {found}", ""
    else:
        yield f"expected {expected}, found {found}", ""
    if row.verdict not in (AS_EXPECTED, row.what):  # a verdict that equals the row's name would only repeat it
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
