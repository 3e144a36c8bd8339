"""The remarks below the status table: why nodes are not healthy, then the findings that say more than that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.text import Text

from gpumesh.cli.views.console import console
from gpumesh.cli.views.figures import format_duration, shorten
from gpumesh.cli.views.findings import SEVERITY_MARKS, add_hint, finding_text
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.status.health_marks import MARKS, STYLES
from gpumesh.sentences import join_some
from gpumesh.state import Finding, MeshState, NodeState, TunnelPhase

MAX_NAMED_NODES = 4

Remark = tuple[Text, Text]  # the mark, and the text


def list_remarks(state: MeshState) -> list[Remark]:
    """Reasons of nodes first. A finding that only repeats the reason of its node is left out."""
    unwell = [node for node in state.nodes if node.reason is not None]
    covered: set[tuple[str | None, str]] = set()
    for node in unwell:
        covered.add((node.name, node.reason or ""))
        if node.tunnel.error_code is not None:
            covered.add((node.name, node.tunnel.error_code))
    remaining = [
        finding
        for finding in state.findings
        if (finding.node, finding.message) not in covered and (finding.node, finding.code) not in covered
    ]
    reasons = [(Text(MARKS[node.health], style=STYLES[node.health]), _reason_text(node, state)) for node in unwell]
    return reasons + [
        (Text(*SEVERITY_MARKS[finding.severity]), finding_text(finding)) for finding in merge_equal(remaining)
    ]


def _reason_text(node: NodeState, state: MeshState) -> Text:
    reason = clean_line(node.reason or "", 400)
    text = Text.assemble((clean_line(node.name, 60), "bold"), f" {node.health}: {reason}")
    if node.tunnel.retry_in_s is not None and node.tunnel.state is not TunnelPhase.UP:
        text.append(f" (again in {format_duration(node.tunnel.retry_in_s)})", style="dim")
    add_hint(text, _reason_hint(node, state))
    return text


def _reason_hint(node: NodeState, state: MeshState) -> str | None:
    """What to do about a node's reason: the hint of its tunnel, else of the finding with the same message."""
    if node.tunnel.state is not TunnelPhase.UP:
        return node.tunnel.hint
    matching = (finding for finding in state.findings if finding.node == node.name and finding.message == node.reason)
    return next((finding.hint for finding in matching), None)


def merge_equal(findings: list[Finding]) -> Iterator[Finding]:
    """One finding for all nodes that have the same, with as many of their names as can be read at a glance."""
    nodes_of: dict[Finding, list[str]] = {}
    for finding in findings:
        if finding.nodes or finding.node is None:  # it is about several nodes, or about none
            nodes_of[finding] = []
        else:
            nodes_of.setdefault(replace(finding, node=None), []).append(finding.node)
    for finding, names in nodes_of.items():
        shown = join_some([clean_line(name, 60) for name in names], MAX_NAMED_NODES)
        yield replace(finding, node=shown) if names else finding


def fit_remarks(remarks: list[Remark], width: int, room: int) -> tuple[list[Remark], int]:
    """The first remarks that fit into ``room`` lines, with a line that counts the rest; and how many lines they
    take."""
    out, shown, used = console(), list[Remark](), 0
    for position, remark in enumerate(remarks):
        height = len(remark[1].wrap(out, max(width - 2, 1), overflow="fold"))
        is_last = position == len(remarks) - 1
        if used + height + (not is_last) > room:
            more = len(remarks) - position
            text = f"{more} {'more ' if shown else ''}remark{'' if more == 1 else 's'}: `gpumesh status` says all"
            rest = (Text("…", style="dim"), Text(shorten(text, max(width - 2, 1)), style="dim"))
            return [*shown, rest], used + 1
        shown.append(remark)
        used += height
    return shown, used
