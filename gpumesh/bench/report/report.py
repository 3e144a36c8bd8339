"""Writes the HTML report of a benchmark: one self-contained page, without scripts or network.

It begins with the answer in sentences; then come plots with their tables, then the conditions of the run. All text that
came from a host or a file is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpumesh.bench.figures.cost import StageCost
from gpumesh.bench.figures.node_shares import NodeShare
from gpumesh.bench.figures.phases import Phase
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.report import svg
from gpumesh.bench.report.answers.answer import answer_parts, partial_sentence
from gpumesh.bench.report.answers.cost_answer import format_eur
from gpumesh.bench.report.figure_tables import (
    MAX_STAGE_COLUMNS,
    StageFigure,
    latency_table,
    stage_table,
    throughput_table,
)
from gpumesh.bench.report.html_parts import MAX_SENTENCES, escape_text, html_table, html_terms
from gpumesh.bench.report.page import html_page
from gpumesh.bench.report.plots import latency_plots, request_timeline, throughput_plots
from gpumesh.bench.report.sections.failover_section import failover_section, node_events_section
from gpumesh.bench.report.sections.load_section import describe_mesh_access, load_html
from gpumesh.bench.report.sections.routes_section import routes_section
from gpumesh.bench.report.sections.server_times import server_times_html
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.settings import Scenario

_PHASE_FIGURES: tuple[tuple[str, Callable[[Phase], str]], ...] = (
    ("requests", lambda phase: f"{phase.requests:,}"),
    ("failed", lambda phase: f"{phase.failed:,}"),
    ("retried", lambda phase: f"{phase.retried:,}"),
    ("end-to-end p50 ms", lambda phase: svg.format_number(phase.end_to_end.p50)),
    ("end-to-end p90 ms", lambda phase: svg.format_number(phase.end_to_end.p90)),
    ("end-to-end p99 ms", lambda phase: svg.format_number(phase.end_to_end.p99)),
    ("longest gap ms", lambda phase: svg.format_number(phase.longest_gap_ms)),
    ("output tok/s", lambda phase: svg.format_number(phase.output_tokens_per_s)),
)
_SHARE_FIGURES: tuple[tuple[str, Callable[[NodeShare], str]], ...] = (
    ("requests served", lambda share: f"{share.served:,}"),
    ("share of the requests", lambda share: f"{share.share:.0%}"),
    ("output tokens", lambda share: svg.format_count(share.output_tokens)),
    ("server tok/s", lambda share: svg.format_number(share.server_tokens_per_s)),
)


def report_html(result: BenchResult, records: Sequence[LoadSample] = ()) -> str:
    """Returns the page. With ``records``, it also has a plot of the requests over time, except for ``overhead``."""
    title = f"gpumesh bench: {result.scenario} of {result.settings.model}"
    body = [
        f"<h1>{escape_text(title)}</h1>",
        f'<p class="sub">mesh {escape_text(result.environment.mesh)}, {result.at:%Y-%m-%d %H:%M} UTC, '
        f"gpumesh {escape_text(result.environment.gpumesh)}</p>",
        _partial_note(result),
        _answer(result),
        *(f'<p class="note">{escape_text(note, MAX_SENTENCES)}</p>' for note in result.notes),
        routes_section(result),
        failover_section(result),
        node_events_section(result.stages),
        *_throughput(result),
        "<h2>Latency</h2>",
        *latency_plots(result),
        latency_table(result.stages),
        request_timeline(result.scenario, records),
        _scaling(result),
        _phases(result.stages),
        _shares(result.stages),
        server_times_html(result),
        _gpus_and_cost(result),
        _failures(result.stages),
        load_html(result),
        _conditions(result),
    ]
    return html_page(title, body)


def _throughput(result: BenchResult) -> list[str]:
    """The section of the rates. ``overhead`` has none: its answers have one token, so that a rate means nothing."""
    if result.scenario is Scenario.OVERHEAD:
        return []
    return ["<h2>Throughput</h2>", *throughput_plots(result), throughput_table(result.stages)]


def _answer(result: BenchResult) -> str:
    """The answer in sentences; empty if nothing was measured."""
    terms = html_terms((part.topic, part.text) for part in answer_parts(result))
    return f'<section class="answer">{terms}</section>' if terms else ""


def _partial_note(result: BenchResult) -> str:
    """The sentence that says that the result is partial; empty for a whole result."""
    sentence = partial_sentence(result)
    return "" if sentence is None else f'<p class="note partial">{escape_text(sentence)}</p>'


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
            rows = [[name, *(figure(phase) for phase in stage.phases)] for name, figure in _PHASE_FIGURES]
            parts.append(html_table(["", *(phase.name for phase in stage.phases)], rows))
    return "".join(parts)


def _shares(stages: Sequence[StageResult]) -> str:
    """The section about the requests that each node served in the stages of the mesh; empty without such stages."""
    mesh_stages = [stage for stage in stages if stage.node is None and stage.nodes]
    if not mesh_stages:
        return ""
    labels = ["", *map(stage_label, mesh_stages)]
    names = dict.fromkeys(share.node for stage in mesh_stages for share in stage.nodes)
    if not 1 < len(mesh_stages) <= MAX_STAGE_COLUMNS:
        return "<h2>Who served what</h2>" + _shares_by_stage(mesh_stages)
    rows: list[list[str]] = []
    for title, figure in _SHARE_FIGURES:
        rows.append([title])
        for name in names:
            shares = [next((share for share in stage.nodes if share.node == name), None) for stage in mesh_stages]
            cells = [svg.format_number(None) if share is None else figure(share) for share in shares]
            rows.append([escape_text(name), *cells])
    return "<h2>Who served what</h2>" + html_table(labels, rows)


def _shares_by_stage(stages: Sequence[StageResult]) -> str:
    """The same with a row for each node of each stage: for a single stage, and for more than there are columns."""
    rows = [
        [escape_text(f"{stage_label(stage)}: {share.node}"), *(figure(share) for _title, figure in _SHARE_FIGURES)]
        for stage in stages
        for share in stage.nodes
    ]
    return html_table(["stage: node", *(title for title, _figure in _SHARE_FIGURES)], rows)


def _gpus_and_cost(result: BenchResult) -> str:
    """The section about the use of the GPUs and the cost of tokens; empty if both are unknown for all stages."""
    costs = {cost.stage: cost for cost in result.costs}
    unknown = StageCost("", None, None)
    figures: list[StageFigure] = [
        ("GPUs", lambda stage: "" if stage.gpu is None else str(stage.gpu.gpus)),
        ("utilisation %", lambda stage: svg.format_number(stage.gpu.utilization_pct if stage.gpu else None)),
        ("power W", lambda stage: svg.format_number(stage.gpu.power_w if stage.gpu else None)),
        ("energy J", lambda stage: svg.format_number(stage.gpu.energy_j if stage.gpu else None)),
        ("output tokens/J", lambda stage: svg.format_number(stage.tokens_per_joule)),
        ("rent, EUR a million", lambda stage: format_eur(costs.get(stage_label(stage), unknown).rent_eur)),
        ("GPU energy, EUR a million", lambda stage: format_eur(costs.get(stage_label(stage), unknown).energy_eur)),
    ]
    stages = [stage for stage in result.stages if stage.gpu is not None or stage_label(stage) in costs]
    table = stage_table(stages, figures)
    if not table:
        return ""
    if not costs:
        return "<h2>GPUs</h2>" + table
    explanation = (
        "EUR for a million output tokens at the load of the stage. A rented node costs the same with less work. "
        "The energy is that of the GPUs, without the rest of the hosts."
    )
    return f'<h2>GPUs and cost</h2><p class="sub">{explanation}</p>{table}'


def _failures(stages: Sequence[StageResult]) -> str:
    """The section about requests that failed; empty if none failed."""
    rows = (
        [escape_text(stage_label(stage)), str(failure.count), escape_text(failure.code), escape_text(failure.message)]
        for stage in stages
        for failure in stage.failures
    )
    table = html_table(["stage", "requests", "code", "reason"], rows, text_columns=[2, 3])
    return "<h2>What failed</h2>" + table if table else ""


def _conditions(result: BenchResult) -> str:
    """The section about the conditions of the run: the measuring machine, the settings, and each node."""
    environment, settings = result.environment, result.settings
    conditions = [
        ("measured from", f"{environment.platform}, {environment.cpus or '?'} CPUs, Python {environment.python}"),
        ("mesh", describe_mesh_access(environment)),
        (
            "prompts",
            f"about {settings.prompt_tokens} tokens with a nonce at the start, {settings.tokens} tokens to answer",
        ),
        ("think", "not sent" if settings.think is None else str(settings.think).lower()),
        ("good is", f"TTFT ≤ {result.objective.ttft_ms:g} ms and TPOT ≤ {result.objective.tpot_ms:g} ms"),
    ]
    for node in environment.nodes:
        text = "GPUs unknown" if node.gpus is None else ", ".join(node.gpus) or "no GPU"
        text += f"; {node.backend} {node.version}" if node.version else f"; {node.backend}"
        if node.transport != "none":  # a server that was measured without a mesh
            text += f" over {node.transport}"
        if node.rtt_ms is not None:
            text += f", round trip {svg.format_number(node.rtt_ms)} ms"
        if node.eur_per_hour is not None:
            text += f", EUR {format_eur(node.eur_per_hour)} an hour"
        if node.simulated:
            text += ", simulated"
        if not node.measured:
            text += ", not measured"
        conditions.append((node.name, text))
    return f"<h2>Conditions</h2>{html_terms(conditions)}"
