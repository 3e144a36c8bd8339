"""The page of a comparison: the answer first, one file that loads nothing, and no markup of a host's."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

from gpumesh.bench.comparison.compare import compare
from gpumesh.bench.report.change_plot import ChangeRow, draw_changes
from gpumesh.bench.report.comparison_report import comparison_html
from gpumesh.bench.results.result import BenchResult
from tests.bench.comparison.simulated_runs import make_result
from tests.bench.comparison.test_compare import measured, repeated
from tests.bench.example_results import full_result, result
from tests.bench.report.test_report import HOSTILE, Page


def page_of(a: BenchResult, b: BenchResult, *, gate: tuple[str, ...] = ()) -> Page:
    return Page(comparison_html(compare(a, b), a, b, gate=gate))


def test_the_answer_comes_first_then_each_stage_then_the_conditions() -> None:
    rng = random.Random(1)
    page = page_of(make_result(rng, repeat=3, count=12), make_result(rng, repeat=3, count=12, slower=1.5))
    assert page.headings == ["gpumesh bench compare: quick of qwen2.5:7b", "alpha", "beta", "mesh", "Conditions"]
    text = " ".join(page.words)
    assert text.index(" worse") < text.index("tpot p50")
    assert "3 runs" in text
    tooltips = [word for word in page.words if word.startswith("tpot p50: ")]
    assert len(tooltips) == 3
    assert all(tooltip.endswith(", worse") for tooltip in tooltips)


def test_gate_unlike_and_caveats_are_notes() -> None:
    other = replace(result(measured()), settings=replace(result().settings, tokens=9))
    page = page_of(result(measured()), other, gate=("mesh, tpot p50: worse by 10 %",))
    text = " ".join(page.words)
    for sentence in ("worse by 10 %", "not the same tokens: 64 and 9", "both are single runs"):
        assert sentence in text


def test_nothing_is_loaded_and_no_host_writes_markup() -> None:
    hostile = result(replace(measured(), name=HOSTILE))
    (node,) = hostile.environment.nodes
    hostile = replace(hostile, environment=replace(hostile.environment, nodes=(replace(node, version=HOSTILE),)))
    page = page_of(hostile, hostile)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe"})
    assert all(not name.startswith("on") and name not in ("src", "href") for _, each in page.tags for name in each)


def test_every_optional_part_and_no_part_at_all() -> None:
    page_of(full_result(), full_result())
    assert "no figure in common" in " ".join(page_of(result(), result()).words)
    page_of(repeated(10.0, 11.0), result(measured()))


def test_a_plot_has_a_row_for_each_change() -> None:
    rows = [ChangeRow("tpot p50", 1.0, 5.0, 9.0, "worse"), ChangeRow("ttft", -1e9, 3.0, 1e9, "no clear difference")]
    plot = draw_changes("Change", rows)
    assert plot.count("<circle") == 2
    assert 'class="s5"' in plot, "the colour of what is worse"
    assert draw_changes("Change", []) == ""
    positions = [float(position) for position in re.findall(r' cx="([^"]*)%"', plot)]
    assert len(positions) == 2
    assert all(math.isfinite(x) and 0 < x < 100 for x in positions), "in percent of the width"
