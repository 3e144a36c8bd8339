"""The report's section about the servers' own times: queue, load, prefill, generation, for each stage and node."""

from __future__ import annotations

from gpumesh.bench.figures.summary import stage_label
from gpumesh.bench.report import svg
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.results.result import BenchResult

EXPLANATION = (
    "By the servers' own counters, as far as the servers give them and they do not contradict the times measured here. "
    "Queue: the wait inside the server. Load: the wait until the model was in memory. A dash: the server does not say."
)
COLUMNS = (
    "stage: node",
    "answers",
    "generating tok/s",
    "prefill tok/s p50",
    "queue ms p50",
    "p90",
    "max",
    "load ms max",
    "cold starts",
)


def server_times_html(result: BenchResult) -> str:
    """The section about the servers' own times; empty if no server gave any of these figures."""
    rows = []
    for stage in result.stages:
        for share in stage.nodes:
            if not (share.wait_ms.n or share.load_ms.n or share.prefill_tokens_per_s.n or share.server_tokens_per_s):
                continue
            rows.append(
                [
                    escape_text(f"{stage_label(stage)}: {share.node}"),
                    str(share.served),
                    svg.format_number(share.server_tokens_per_s),
                    svg.format_number(share.prefill_tokens_per_s.p50),
                    svg.format_number(share.wait_ms.p50),
                    svg.format_number(share.wait_ms.p90),
                    svg.format_number(share.wait_ms.max),
                    svg.format_number(share.load_ms.max),
                    str(share.cold_starts) if share.load_ms.n else svg.format_number(None),
                ]
            )
    cold_starts = html_table(
        ("cold start of", "stage", "load s"),
        (
            [escape_text(start.node), escape_text(start.stage), svg.format_number(start.load_ms / 1000.0)]
            for start in result.cold_starts
        ),
    )
    if not rows and not cold_starts:
        return ""
    return f'<h2>The servers\' own times</h2><p class="sub">{EXPLANATION}</p>' + html_table(COLUMNS, rows) + cold_starts
