"""Writes the HTML report of a comparison: the answer, then a plot and a table of each stage, then the conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.bench.comparison.compare import Basis, Comparison, Difference, DifferenceVerdict
from gpumesh.bench.comparison.significance import FALSE_SHARE
from gpumesh.bench.comparison.verdict_text import change_text, interval_text, summary_sentence
from gpumesh.bench.report.change_plot import ChangeRow, draw_changes
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.report.page import html_page
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult

_VERDICTS = {
    DifferenceVerdict.BETTER: "better",
    DifferenceVerdict.WORSE: "worse",
    DifferenceVerdict.SAME: "no clear difference",
    DifferenceVerdict.UNKNOWN: "too few to tell",
}


def comparison_html(comparison: Comparison, a: BenchResult, b: BenchResult, *, gate: Sequence[str] = ()) -> str:
    """Returns the page. ``gate``: a sentence for each figure that is worse by more than a limit that was given."""
    title = f"gpumesh bench compare: {b.scenario} of {b.settings.model}"
    stages = dict.fromkeys(difference.stage for difference in comparison.differences)
    body = [
        f"<h1>{escape_text(title)}</h1>",
        f'<p class="sub">A: {_when(a)}. B: {_when(b)}.</p>',
        f"<p><strong>{escape_text(summary_sentence(comparison))}</strong></p>",
        _gate_note(gate),
        *(f'<p class="note">{escape_text(sentence)}</p>' for sentence in comparison.unlike),
        *(f'<p class="note">{escape_text(caveat)}</p>' for caveat in comparison.caveats),
    ]
    for stage in stages:
        differences = [difference for difference in comparison.differences if difference.stage == stage]
        body.append(f"<h2>{escape_text(stage)}</h2>")
        body.append(draw_changes(f"Change from A to B, stage {stage}", list(_plot_rows(differences))))
        body.append(_table(differences))
    body += [f'<p class="sub">{_method(comparison)}</p>', "<h2>Conditions</h2>", _conditions(a, b)]
    return html_page(title, body)


def _gate_note(failures: Sequence[str]) -> str:
    """The figures that are worse by more than the limit; empty if there are none."""
    if not failures:
        return ""
    rows = "".join(f"<li>{escape_text(failure)}</li>" for failure in failures)
    return f'<div class="note">Worse by more than the gate allows:<ul>{rows}</ul></div>'


def _when(result: BenchResult) -> str:
    runs = f"{len(result.runs)} runs" if result.runs else "a single run"
    return f"{result.at:%Y-%m-%d %H:%M} UTC, {runs}"


def _plot_rows(differences: Sequence[Difference]) -> Iterator[ChangeRow]:
    """A row for each figure whose change has an interval."""
    for difference in differences:
        if difference.ratio is not None and difference.ratio_low is not None and difference.ratio_high is not None:
            low, high = 100.0 * (difference.ratio_low - 1.0), 100.0 * (difference.ratio_high - 1.0)
            change = 100.0 * (difference.ratio - 1.0)
            yield ChangeRow(difference.figure, low, change, high, _VERDICTS[difference.verdict])


def _table(differences: Sequence[Difference]) -> str:
    """The table of the figures that both results have: a row for each difference."""
    return html_table(
        ["figure", "A", "B", "change", "interval", "verdict"],
        (
            [
                escape_text(f"{difference.figure} ({difference.unit})" if difference.unit else difference.figure),
                format_number(difference.a),
                format_number(difference.b),
                escape_text(change_text(difference)),
                escape_text(interval_text(difference)),
                _VERDICTS[difference.verdict],
            ]
            for difference in differences
        ),
    )


def _method(comparison: Comparison) -> str:
    """How the verdicts were made."""
    spread = (
        f"the spread between the runs ({comparison.runs_a} of A, {comparison.runs_b} of B)"
        if comparison.basis is Basis.BETWEEN_RUNS
        else "the spread within the two runs and an assumed drift from run to run"
    )
    return (
        f"Verdicts by Welch's t test on {spread}, and over all figures by the procedure of Benjamini and Hochberg: "
        f"at most {FALSE_SHARE * 100:g} % of the verdicts are false on average. The intervals are as wide as that."
    )


def _conditions(a: BenchResult, b: BenchResult) -> str:
    """The conditions of both results side by side; equal ones too."""
    rows: list[list[object]] = [
        ["scenario", a.scenario, b.scenario],
        ["model", a.settings.model, b.settings.model],
        ["tokens", a.settings.tokens, b.settings.tokens],
        ["prompt tokens", a.settings.prompt_tokens, b.settings.prompt_tokens],
        ["gpumesh", a.environment.gpumesh, b.environment.gpumesh],
        ["measured from", _machine(a), _machine(b)],
    ]
    names = dict.fromkeys(node.name for result in (a, b) for node in result.environment.nodes)
    rows += [[name, _node(a, name), _node(b, name)] for name in names]
    return html_table(["", "A", "B"], [[escape_text(cell) for cell in row] for row in rows])


def _machine(result: BenchResult) -> str:
    return f"{result.environment.platform}, {result.environment.cpus or '?'} CPUs"


def _node(result: BenchResult, name: str) -> str:
    """The node as it was in this result."""
    node = next((node for node in result.environment.nodes if node.name == name), None)
    if node is None:
        return "not there"
    gpus = "GPUs unknown" if node.gpus is None else ", ".join(node.gpus) or "no GPU"
    parallel = "" if node.parallel is None else f", {node.parallel} at once"
    driver = "" if node.driver is None else f", driver {node.driver}"
    return f"{gpus}{driver}; {node.backend} {node.version or ''}{parallel}"
