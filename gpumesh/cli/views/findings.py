"""Findings and remarks as text: a mark, the node, the message, and the hint below it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.state import Finding, Severity

SEVERITY_MARKS = {Severity.ERROR: ("✗", "red"), Severity.WARNING: ("!", "yellow"), Severity.INFO: ("i", "cyan")}


def print_findings(findings: Sequence[Finding]) -> None:
    out = console()
    if not findings:
        print_plain(out, Text("no findings", style="green"))
        return
    print_plain(
        out,
        make_notes_table([(Text(*SEVERITY_MARKS[finding.severity]), finding_text(finding)) for finding in findings]),
    )


def make_notes_table(notes: Sequence[tuple[Text, Text]]) -> Table:
    """A table of remarks, which are pairs of a mark (left) and its text (right)."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for mark, text in notes:
        table.add_row(mark, text)
    return table


def finding_text(finding: Finding) -> Text:
    node_names = ", ".join(finding.nodes) or finding.node
    text = Text()
    if node_names:
        text.append(f"{clean_line(node_names, 200)} ", style="bold")
    text.append(f"{clean_line(finding.code, 40)}: {clean_line(finding.message, 400)}")
    add_hint(text, finding.hint)
    return text


def add_hint(text: Text, hint: str | None) -> None:
    if hint:
        text.append(f"\n→ {clean_line(hint, 400)}", style="dim")
