"""The remarks below the status table: the reasons why nodes are not healthy, then the findings that say more."""

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
    nodes_with_reason = [node for node in state.nodes if node.reason is not None]
    # A node, and the message or the code of a finding that would repeat the reason of this node.
    repeated: set[tuple[str | None, str]] = set()
    for node in nodes_with_reason:
        repeated.add((node.name, node.reason or ""))
        if node.tunnel.error_code is not None:
            repeated.add((node.name, node.tunnel.error_code))
    remaining = [
        finding
        for finding in state.findings
        if (finding.node, finding.message) not in repeated and (finding.node, finding.code) not in repeated
    ]
    reasons = [
        (Text(MARKS[node.health], style=STYLES[node.health]), _reason_text(node, state)) for node in nodes_with_reason
    ]
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
    """Merges equal findings of different nodes into one that names the nodes, the first MAX_NAMED_NODES of them."""
    nodes_of: dict[Finding, list[str]] = {}
    for finding in findings:
        if finding.nodes or finding.node is None:  # a finding about several nodes, or about none
            nodes_of[finding] = []
        else:
            nodes_of.setdefault(replace(finding, node=None), []).append(finding.node)
    for finding, names in nodes_of.items():
        shown_names = join_some([clean_line(name, 60) for name in names], MAX_NAMED_NODES)
        yield replace(finding, node=shown_names) if names else finding


def fit_remarks(remarks: list[Remark], width: int, room: int) -> tuple[list[Remark], int]:
    """Returns the first remarks that fit into ``room`` lines, with a line that counts the rest; and then the number
    of these lines."""
    out, fitting, used_lines = console(), list[Remark](), 0
    for position, remark in enumerate(remarks):
        height = len(remark[1].wrap(out, max(width - 2, 1), overflow="fold"))
        is_last = position == len(remarks) - 1
        lines_after = 0 if is_last else 1  # for the count of the rest
        if used_lines + height + lines_after > room:
            hidden_count = len(remarks) - position
            more = "more " if fitting else ""
            text = f"{hidden_count} {more}remark{'' if hidden_count == 1 else 's'}: `gpumesh status` says all"
            rest = (Text("…", style="dim"), Text(shorten(text, max(width - 2, 1)), style="dim"))
            return [*fitting, rest], used_lines + 1
        fitting.append(remark)
        used_lines += height
    return fitting, used_lines
