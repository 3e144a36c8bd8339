"""Draws findings and remarks as text: a mark, the node, the message, and the hint on a line below the message."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.state import Finding, Severity

# By severity: the mark before a finding, then its colour.
SEVERITY_MARKS = {Severity.ERROR: ("✗", "red"), Severity.WARNING: ("!", "yellow"), Severity.INFO: ("i", "cyan")}


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints the findings to stdout, or that there are none."""
    out = console()
    if not findings:
        print_plain(out, Text("no findings", style="green"))
        return
    print_plain(
        out,
        make_notes_table([(Text(*SEVERITY_MARKS[finding.severity]), finding_text(finding)) for finding in findings]),
    )


def make_notes_table(notes: Sequence[tuple[Text, Text]]) -> Table:
    """A table of remarks. ``notes``: pairs of a mark, which stands on the left, and a text."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for mark, text in notes:
        table.add_row(mark, text)
    return table


def finding_text(finding: Finding) -> Text:
    """The nodes, the code, the message and the hint of a finding."""
    node_names = ", ".join(finding.nodes) or finding.node
    text = Text()
    if node_names:
        text.append(f"{clean_line(node_names, 200)} ", style="bold")
    text.append(f"{clean_line(finding.code, 40)}: {clean_line(finding.message, 400)}")
    add_hint(text, finding.hint)
    return text


def add_hint(text: Text, hint: str | None) -> None:
    """Appends the hint to the text, on a line of its own; nothing if there is no hint."""
    if hint:
        text.append(f"\n→ {clean_line(hint, 400)}", style="dim")
