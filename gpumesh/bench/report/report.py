"""Writes the HTML report of a benchmark: one self-contained page with tables and plots, without scripts or network.

The page is light or dark by the reader's setting. All text that came from a host or a file is escaped. The page's
content security policy forbids the browser to load or run anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gpumesh.bench.figures.knee import Knee
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.report import svg
from gpumesh.bench.report.answer import partial_sentence
from gpumesh.bench.report.failover_section import failover_section, node_events_section
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.report.routes_section import routes_section
from gpumesh.bench.report.server_times import server_times_html
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import SampleSummary
from gpumesh.bench.workload.settings import Scenario
from gpumesh.text.printable import printable

MAX_POINTS = 3000  # of one plot: a page with more opens slowly, and an eye sees no difference

_STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --soft: #5b6470; --bg: #fff; --rule: #d9dee4; --card: #f6f8fa;
  --c0: #2f6fde; --c1: #d1580b; --c2: #1a8a5a; --c3: #9a3fc4; --c4: #b8860b; --c5: #c2345b; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e9ee; --soft: #9aa5b1; --bg: #14171b; --rule: #333b44;
  --card: #1c2127; --c0: #6ea3ff; --c1: #ff9d57; --c2: #4fd09a; --c3: #cf8cf0; --c4: #e3bb4e; --c5: #ff7d9f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.sub, figcaption, th, dt { color: var(--soft); } p.sub { margin-top: 0; }
.note { background: var(--card); border-left: 4px solid var(--c1); padding: .5rem .8rem; margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 500; }
figure { margin: 1.2rem 0; } svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; }
text.label, text.value { fill: var(--fg); } text.axis { fill: var(--soft); }
.grid { stroke: var(--rule); } .span { stroke: var(--soft); stroke-width: 2; }
.s0 { fill: var(--c0); } .s1 { fill: var(--c1); } .s2 { fill: var(--c2); }
.s3 { fill: var(--c3); } .s4 { fill: var(--c4); } .s5 { fill: var(--c5); }
.line { fill: none; stroke-width: 2; } .line.s0 { stroke: var(--c0); } .line.s1 { stroke: var(--c1); }
.line.s2 { stroke: var(--c2); } .line.s3 { stroke: var(--c3); } .line.s4 { stroke: var(--c4); }
.line.s5 { stroke: var(--c5); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; }
"""


def report_html(result: BenchResult, records: Sequence[LoadSample] = ()) -> str:
    """Returns the page. With ``records``, it also has a plot of the requests over time, except for ``overhead``."""
    title = f"gpumesh bench: {result.scenario} of {result.settings.model}"
    body = [
        f"<h1>{escape_text(title)}</h1>",
        f'<p class="sub">mesh {escape_text(result.environment.mesh)}, {result.at:%Y-%m-%d %H:%M} UTC, '
        f"gpumesh {escape_text(result.environment.gpumesh)}</p>",
        _partial_note(result),
        *(f'<p class="note">{escape_text(note)}</p>' for note in result.notes),
        routes_section(result),
        failover_section(result),
        node_events_section(result.stages),
        "<h2>Throughput</h2>",
        _throughput(result.stages),
        *_plots(result),
        "<h2>Latency</h2>",
        _latency(result.stages),
        _timeline(result.scenario, records),
        _scaling(result),
        _phases(result.stages),
        _shares(result.stages),
        server_times_html(result),
        _gpus(result.stages),
        _failures(result.stages),
        _conditions(result),
    ]
    return html_page(title, body)


def _partial_note(result: BenchResult) -> str:
    """The sentence that says that the result is partial; empty for a whole result."""
    sentence = partial_sentence(result)
    return "" if sentence is None else f'<p class="note partial">{escape_text(sentence)}</p>'


def html_page(title: str, body: Sequence[str]) -> str:
    """The whole page around the parts of its body. ``title`` is escaped here, the parts by the caller; empty parts are
    left out."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # nothing may be loaded or run, except the style below
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)  # a section without content is an empty text
        + "\n</body></html>\n"
    )


_THROUGHPUT_COLUMNS = (
    "stage",
    "in flight",
    "requests",
    "failed",
    "time s",
    "ramp s",
    "tail s",
    "output tok/s",
    "whole stage tok/s",
    "total tok/s",
    "req/s",
    "goodput req/s",
    "server tok/s p50",
)


def _throughput(stages: Sequence[StageResult]) -> str:
    """The table of rates, a row for each stage.

    Output tokens, requests and goodput are those while all slots were busy, without ramp and tail, where that is known.
    """
    return html_table(
        _THROUGHPUT_COLUMNS,
        (
            [
                escape_text(stage_label(stage)),
                "open loop" if stage.concurrency is None else str(stage.concurrency),
                str(stage.requests),
                str(stage.failed + stage.cut),
                svg.format_number(stage.duration_s),
                svg.format_number(stage.rates.ramp_s),
                svg.format_number(stage.rates.tail_s),
                svg.format_number(stage.rates.best_tokens_per_s),
                svg.format_number(stage.rates.output_tokens_per_s),
                svg.format_number(stage.rates.total_tokens_per_s),
                svg.format_number(stage.rates.best_requests_per_s),
                svg.format_number(stage.rates.best_goodput_per_s),
                svg.format_number(stage.rates.server.p50),
            ]
            for stage in stages
        ),
    )


def _percentiles(sample: SampleSummary) -> list[str]:
    """The cells for p50, p90 and p99."""
    return [svg.format_number(sample.p50), svg.format_number(sample.p90), svg.format_number(sample.p99)]


def _latency(stages: Sequence[StageResult]) -> str:
    """The table of latencies: a row for each stage and each kind of latency that has values in this stage."""
    rows: list[list[str]] = []
    for stage in stages:
        latency = stage.latency
        for name, sample in (
            ("TTFT", latency.ttft),
            (_tpot_name(stage), latency.tpot),
            ("inter-token", latency.itl),
            ("end-to-end", latency.end_to_end),
            ("outside the server", latency.outside_server),
            ("in the server's queue", latency.server_wait),
        ):
            if sample.n:
                label = escape_text(f"{stage_label(stage)}, {name}")
                mean, maximum = svg.format_number(sample.mean), svg.format_number(sample.max)
                rows.append([label, f"{sample.n:,}", *_percentiles(sample), mean, maximum])
    return html_table(["ms", "n", "p50", "p90", "p99", "mean", "max"], rows)


def _tpot_name(stage: StageResult) -> str:
    """The name of the TPOT, with the clock that it comes from."""
    source = stage.coverage.tpot_source if stage.coverage is not None else None
    return "TPOT" if source is None else f"TPOT ({source})"


def _plots(result: BenchResult) -> list[str]:
    """The plots of a result. The scenarios ``sweep`` and ``overhead`` have plots of their own."""
    stages = result.stages
    if result.scenario is Scenario.SWEEP:
        return _sweep_plots(stages, result.knee)
    names = [printable(stage_label(stage)) for stage in stages]
    if result.scenario is Scenario.OVERHEAD:  # its answers have one token, so their rate means nothing
        samples = [stage.latency.outside_server for stage in stages]
        return [svg.draw_ranges("Outside the server: the way there and back", _ranges(names, samples), "ms")]
    throughput = [svg.Bar(name, stage.rates.best_tokens_per_s) for name, stage in zip(names, stages, strict=True)]
    # Only the stage of ``failover`` has phases: before, during and after the disturbance.
    throughput += [svg.Bar(phase.name, phase.output_tokens_per_s) for stage in stages for phase in stage.phases]
    return [
        svg.draw_bars("Output tokens per second", throughput, "tok/s"),
        svg.draw_ranges("Time to first token", _ranges(names, [stage.latency.ttft for stage in stages]), "ms"),
        svg.draw_ranges("End-to-end", _ranges(names, [stage.latency.end_to_end for stage in stages]), "ms"),
    ]


def _ranges(names: Sequence[str], samples: Sequence[SampleSummary]) -> list[svg.Range]:
    """A row of the plot for each sample, from p50 to p99."""
    return [
        svg.Range(name, (("p50", sample.p50), ("p90", sample.p90), ("p99", sample.p99)))
        for name, sample in zip(names, samples, strict=True)
    ]


def _sweep_plots(stages: Sequence[StageResult], knee: Knee | None) -> list[str]:
    """The plots of ``sweep``: output rate, TTFT and goodput over concurrency. The knee is marked."""
    mark = None if knee is None else (float(knee.level), "knee")

    def plot_over_concurrency(label: str, values: Iterable[float | None]) -> svg.PlotSeries:
        """A series of points (concurrency, value), one for each stage whose value is known."""
        points: list[tuple[float, float]] = []
        for stage, value in zip(stages, values, strict=True):
            if value is not None:
                points.append((float(stage.concurrency or 0), value))  # a stage of ``sweep`` has a concurrency: never 0
        return svg.PlotSeries(label, tuple(points))

    throughput = [plot_over_concurrency("tokens", (stage.rates.best_tokens_per_s for stage in stages))]
    goodput = [plot_over_concurrency("goodput", (stage.rates.best_goodput_per_s for stage in stages))]
    ttft = [
        plot_over_concurrency("p50", (stage.latency.ttft.p50 for stage in stages)),
        plot_over_concurrency("p90", (stage.latency.ttft.p90 for stage in stages)),
    ]
    return [
        svg.draw_points(
            "Output tokens per second over concurrency", throughput, "in flight", "tok/s", lines=True, mark=mark
        ),
        svg.draw_points("Time to first token over concurrency", ttft, "in flight", "ms", lines=True, mark=mark),
        svg.draw_points("Goodput over concurrency", goodput, "in flight", "req/s", lines=True),
    ]


def _timeline(scenario: Scenario, records: Sequence[LoadSample]) -> str:
    """A plot of the served requests of the last stage: when each was sent and how long it took, in a colour per node.

    With more than ``MAX_POINTS`` requests, only every second (third, …) request has a point. Empty without requests,
    and for ``overhead``.
    """
    if not records or scenario is Scenario.OVERHEAD:  # the last stage of ``overhead`` has one node: nothing to compare
        return ""
    last_stage = records[-1].stage
    points = [
        (record.node, record.sent_s, record.end_to_end_ms)
        for record in records
        if record.stage == last_stage and record.end_to_end_ms is not None  # ``None``: the request was not served
    ]
    step = max(math.ceil(len(points) / MAX_POINTS), 1)
    points_by_node: dict[str, list[tuple[float, float]]] = {}
    for node, sent_s, end_to_end_ms in points[::step]:
        points_by_node.setdefault(printable(node or "unknown"), []).append((sent_s, end_to_end_ms))
    series = [svg.PlotSeries(name, tuple(node_points)) for name, node_points in sorted(points_by_node.items())]
    title = f"End-to-end of each request of stage {printable(last_stage)}, by node"
    return svg.draw_points(title, series, "s", "ms", lines=False)


def _scaling(result: BenchResult) -> str:
    """The section about scaling; empty if the scenario does not measure it."""
    scaling = result.scaling
    if scaling is None:
        return ""
    rows = [[escape_text(name), svg.format_number(value)] for name, value in scaling.nodes]
    rows.append(["sum of the nodes alone", svg.format_number(scaling.sum_tokens_per_s)])
    rows.append(["mesh", svg.format_number(scaling.mesh_tokens_per_s)])
    rows.append(["efficiency (mesh ÷ sum)", f"{scaling.efficiency:.1%}"])
    explanation = "While all slots were busy: without the ramp at the start, and without the tail, at which the faster"
    explanation += " nodes have nothing left to do."
    reason = "" if scaling.explanation is None else f'<p class="note">{escape_text(scaling.explanation)}</p>'
    losses = html_table(
        ["", "alone", "in the mesh", "busy of slots", "starved", "slowed", "swapped models"],
        (
            [
                escape_text(loss.node),
                svg.format_number(loss.alone_tokens_per_s),
                svg.format_number(loss.mesh_tokens_per_s),
                f"{loss.busy:.1f} of {loss.slots:.1f}",
                svg.format_number(loss.starved_tokens_per_s),
                svg.format_number(loss.slowed_tokens_per_s),
                svg.format_number(loss.swapped_tokens_per_s),
            ]
            for loss in scaling.losses
        ),
    )
    where = '<p class="sub">Where the loss went, in tokens/s; negative: a gain.</p>' + losses if losses else ""
    table = html_table(["", "output tok/s"], rows)
    return f'<h2>Scaling</h2><p class="sub">{explanation}</p>{reason}{table}{where}'


def _phases(stages: Sequence[StageResult]) -> str:
    """A section for each stage that was disturbed: its phases before, during and after the disturbance."""
    parts = []
    for stage in stages:
        if stage.phases:
            parts.append(f"<h2>{escape_text(stage.disturbance or 'Disturbance')}</h2>")
            rows = (
                [
                    escape_text(phase.name),
                    str(phase.requests),
                    str(phase.failed),
                    str(phase.retried),
                    *_percentiles(phase.end_to_end),
                    svg.format_number(phase.longest_gap_ms),
                    svg.format_number(phase.output_tokens_per_s),
                ]
                for phase in stage.phases
            )
            column_names = ["phase", "requests", "failed", "retried", "end-to-end p50 ms", "p90", "p99"]
            column_names += ["longest gap ms", "output tok/s"]
            parts.append(html_table(column_names, rows))
    return "".join(parts)


def _shares(stages: Sequence[StageResult]) -> str:
    """The section about the requests that each node served in the stages of the mesh; empty without such stages."""
    rows = (
        [
            escape_text(f"{stage_label(stage)}: {share.node}"),
            str(share.served),
            f"{share.share:.0%}",
            svg.format_count(share.output_tokens),
            svg.format_number(share.server_tokens_per_s),
        ]
        for stage in stages
        if stage.node is None
        for share in stage.nodes
    )
    table = html_table(["stage: node", "served", "share", "output tokens", "server tok/s"], rows)
    return "<h2>Who served what</h2>" + table if table else ""


def _gpus(stages: Sequence[StageResult]) -> str:
    """The section about the use of the GPUs; empty if it is unknown for all stages."""
    rows = (
        [
            escape_text(stage_label(stage)),
            str(stage.gpu.gpus),
            svg.format_number(stage.gpu.utilization_pct),
            svg.format_number(stage.gpu.power_w),
            svg.format_number(stage.gpu.energy_j),
            svg.format_number(stage.tokens_per_joule),
        ]
        for stage in stages
        if stage.gpu is not None
    )
    table = html_table(["stage", "GPUs", "utilisation %", "power W", "energy J", "tokens/J"], rows)
    return "<h2>GPUs</h2>" + table if table else ""


def _failures(stages: Sequence[StageResult]) -> str:
    """The section about requests that failed; empty if none failed."""
    rows = (
        [escape_text(stage_label(stage)), str(failure.count), escape_text(failure.code), escape_text(failure.message)]
        for stage in stages
        for failure in stage.failures
    )
    table = html_table(["stage", "requests", "code", "reason"], rows)
    return "<h2>What failed</h2>" + table if table else ""


def _conditions(result: BenchResult) -> str:
    """The section about the conditions of the run: the measuring machine, the settings, and each node."""
    environment, settings = result.environment, result.settings
    conditions = [
        ("measured from", f"{environment.platform}, {environment.cpus or '?'} CPUs, Python {environment.python}"),
        ("mesh", "in the measuring process" if environment.embedded else "already running, over its control socket"),
        (
            "prompts",
            f"about {settings.prompt_tokens} tokens with a nonce at the start, {settings.tokens} tokens to answer",
        ),
        ("think", "not sent" if settings.think is None else str(settings.think).lower()),
        ("good is", f"TTFT ≤ {result.objective.ttft_ms:g} ms and TPOT ≤ {result.objective.tpot_ms:g} ms"),
    ]
    for node in environment.nodes:
        text = "GPUs unknown" if node.gpus is None else ", ".join(node.gpus) or "no GPU"
        text += f"; {node.backend} {node.version or ''} over {node.transport}"
        if node.rtt_ms is not None:
            text += f", round trip {svg.format_number(node.rtt_ms)} ms"
        if node.simulated:
            text += ", simulated"
        conditions.append((node.name, text))
    rows = "".join(f"<dt>{escape_text(name)}</dt><dd>{escape_text(text)}</dd>\n" for name, text in conditions)
    return f"<h2>Conditions</h2><dl>{rows}</dl>"
