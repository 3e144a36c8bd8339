"""The sections of the report about a node that went away: by this benchmark's own doing, or by itself."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.bench.figures.outages.failover_text import failover_sentences
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.results.result import BenchResult


def failover_section(result: BenchResult) -> str:
    """What the outage of ``failover`` did to clients; empty for another scenario."""
    if result.failover is None:
        return ""
    items = "".join(f"<li>{escape_text(sentence)}</li>\n" for sentence in failover_sentences(result.failover))
    return f"<h2>What the outage did</h2><ul>{items}</ul>"


def node_events_section(stages: Sequence[StageResult]) -> str:
    """The nodes that did not serve for a part of a stage; empty if there is none."""
    rows = (
        [
            escape_text(f"{stage_label(stage)}: {event.node}"),
            escape_text(event.health.value),
            f"{event.from_s:.1f}",
            "the end" if event.to_s is None else f"{event.to_s:.1f}",
            escape_text(event.reason or ""),
        ]
        for stage in stages
        for event in stage.node_events
    )
    table = html_table(["stage: node", "was", "from s", "to s", "reason"], rows, text_columns=[4])
    return "<h2>Nodes that went away</h2>" + table if table else ""
