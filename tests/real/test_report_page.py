"""The report of a benchmark in a real headless Chromium: narrow, wide, dark and printed, for several scenarios."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.bench.figures.cost import StageCost
from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.report.report import report_html
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind
from tests.bench.example_results import make_stage_run, record, result, stage, summarize_only
from tests.prerequisites import needs

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    needs("chromium"),
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]

NODES = ("iceland", "a-node-in-the-attic-with-a-rather-long-name")
RECORDS = tuple(
    record(number, sent_s=number / 9, node=NODES[number % 2], ttft_ms=80.0 + 900.0 * (number % 7))
    for number in range(120)
)
# Texts of a plot that overlap each other, or that are outside the plot.
FIND_FAULTS = """() => {
  const faults = [];
  for (const svg of document.querySelectorAll('svg.plot')) {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([name, a], index) => {
      if (a.right > box.right + 1 || a.left < box.left - 1 || a.bottom > box.bottom + 1 || a.top < box.top - 1)
        faults.push(`${name} is outside of ${svg.ariaLabel}`);
      for (const [other, b] of texts.slice(index + 1))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
          faults.push(`${name} is on ${other} in ${svg.ariaLabel}`);
    });
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) faults.push('the page is wider than the screen');
  return faults;
}"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def measured(name: str, **changes: Any) -> StageResult:
    run = make_stage_run(*(replace(each, stage=name) for each in RECORDS), of=stage(name, count=len(RECORDS)))
    return replace(summarize_only(run), **changes)


def made_results() -> dict[str, BenchResult]:
    alone = [measured(name, node=name, kind=StageKind.NODE) for name in NODES]
    levels = [measured(f"c={level}", concurrency=level) for level in (1, 2, 4, 8, 16, 32, 64)]
    disturbed = summarize_only(make_stage_run(*RECORDS, disturbed_s=(4.0, 8.0), disturbance=f"{NODES[1]} drained"))
    costs = (StageCost("mesh", 0.4, 0.1),)
    return {
        "quick": result(*alone, measured("mesh"), costs=costs, notes=("a note " * 20,)),
        "sweep": result(*levels, scenario=Scenario.SWEEP, knee=find_knee(levels, Objective())),
        "failover": result(disturbed, scenario=Scenario.FAILOVER),
        "partial": result(measured("mesh", partial=True, planned=500), partial=True, partial_reason="killed"),
    }


@pytest.mark.parametrize("name", ["quick", "sweep", "failover", "partial"])
async def test_it_fits_every_screen_and_paper(browser: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(report_html(made_results()[name], RECORDS))
    context = await browser.new_context(viewport={"width": 1200, "height": 900})
    try:
        page = await context.new_page()
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        await page.goto(file.as_uri())
        for width in (1200, 360):
            await page.set_viewport_size({"width": width, "height": 900})
            assert await page.evaluate(FIND_FAULTS) == [], f"{width} pixels wide"
        light = await page.evaluate(BACKGROUND)
        await page.emulate_media(color_scheme="dark")
        assert await page.evaluate(BACKGROUND) != light
        await page.emulate_media(media="print", color_scheme="dark")
        await page.set_viewport_size({"width": 700, "height": 900})
        assert await page.evaluate(BACKGROUND) == light, "paper is white"
        assert await page.evaluate(FIND_FAULTS) == [], "on paper"
        assert (asked, errors) == ([file.as_uri()], []), "nothing else is loaded, and nothing is refused"
    finally:
        await context.close()
