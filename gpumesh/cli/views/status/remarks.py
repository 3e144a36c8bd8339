"""Draws the remarks below the status table: the reasons why nodes are not healthy, then the findings that say more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.text import Text

from gpumesh.cli.views.console import console
from gpumesh.cli.views.figures import format_duration, shorten
from gpumesh.cli.views.findings import SEVERITY_MARKS, add_hint, finding_text
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.status.health_marks import MARKS, STYLES
from gpumesh.state import Finding, MeshState, NodeState, TunnelPhase
from gpumesh.text.sentences import join_some

MAX_NAMED_NODES = 4  # of the nodes that have equal findings; the others are counted

Remark = tuple[Text, Text]
"""A mark, then the text."""


def list_remarks(state: MeshState) -> list[Remark]:
    """The remarks of the whole mesh: first the reasons of nodes, then the findings. Leaves out a finding that only
    repeats the reason of its node."""
    remarks: list[Remark] = []
    # Pairs of a node, and the message or the code of a finding that would repeat the reason of this node.
    repetitions: set[tuple[str | None, str]] = set()
    for node in state.nodes:
        if node.reason is None:
            continue
        remarks.append((Text(MARKS[node.health], style=STYLES[node.health]), _reason_text(node, state)))
        repetitions.add((node.name, node.reason))
        if node.tunnel.error_code is not None:
            repetitions.add((node.name, node.tunnel.error_code))
    new_findings = []
    for finding in state.findings:
        repeats_reason = (finding.node, finding.message) in repetitions
        repeats_error_code = (finding.node, finding.code) in repetitions
        if not repeats_reason and not repeats_error_code:
            new_findings.append(finding)
    for finding in merge_equal(new_findings):
        remarks.append((Text(*SEVERITY_MARKS[finding.severity]), finding_text(finding)))
    return remarks


def _reason_text(node: NodeState, state: MeshState) -> Text:
    """The node, its health, the reason for it, when the tunnel tries again, and a hint."""
    reason = clean_line(node.reason or "", 400)
    text = Text.assemble((clean_line(node.name, 60), "bold"), f" {node.health}: {reason}")
    if node.tunnel.retry_in_s is not None and node.tunnel.state is not TunnelPhase.UP:
        text.append(f" (again in {format_duration(node.tunnel.retry_in_s)})", style="dim")
    add_hint(text, _reason_hint(node, state))
    return text


def _reason_hint(node: NodeState, state: MeshState) -> str | None:
    """What to do about a node's reason: the hint of its tunnel if the tunnel is not up, else the hint of the finding
    that has the reason as its message."""
    if node.tunnel.state is not TunnelPhase.UP:
        return node.tunnel.hint
    node_findings = [finding for finding in state.findings if finding.node == node.name]
    return next((finding.hint for finding in node_findings if finding.message == node.reason), None)


def merge_equal(findings: list[Finding]) -> Iterator[Finding]:
    """Merges equal findings of different nodes into one finding, whose ``node`` names the first MAX_NAMED_NODES nodes
    and counts the others."""
    nodes_by_finding: dict[Finding, list[str]] = {}
    for finding in findings:
        if finding.nodes or finding.node is None:  # a finding about several nodes, or about none, stays as it is
            nodes_by_finding[finding] = []
        else:
            nodes_by_finding.setdefault(replace(finding, node=None), []).append(finding.node)
    for finding, nodes in nodes_by_finding.items():
        if nodes:
            shown_names = join_some([clean_line(node, 60) for node in nodes], MAX_NAMED_NODES)
            yield replace(finding, node=shown_names)
        else:
            yield finding


def fit_remarks(remarks: list[Remark], width: int, room: int) -> list[Remark]:
    """Returns the remarks that fit into ``room`` lines. If there is no room for all, the first remarks stay, and
    one more remark counts the others."""
    out = console()
    text_width = max(width - 2, 1)  # without the mark and a blank
    used_lines = 0
    for position, (_, text) in enumerate(remarks):
        height = len(text.wrap(out, text_width, overflow="fold"))
        is_last = position == len(remarks) - 1
        count_lines = 0 if is_last else 1  # for the remark that counts the others
        if used_lines + height + count_lines > room:
            hidden_count = len(remarks) - position
            more = "" if position == 0 else "more "
            count_text = f"{hidden_count} {more}remark{'' if hidden_count == 1 else 's'}: `gpumesh status` says all"
            count_remark = (Text("…", style="dim"), Text(shorten(count_text, text_width), style="dim"))
            return [*remarks[:position], count_remark]
        used_lines += height
    return remarks
