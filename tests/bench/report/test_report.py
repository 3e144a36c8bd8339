"""The page: one file that loads nothing, says all, and lets no host say anything of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.scaling import Scaling
from gpumesh.bench.figures.summary import StageResult, summarize_stage
from gpumesh.bench.load.conditions import Limit, LoadConditions, MachineLoad, ProcessLoad, Via
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.report.plots import MAX_POINTS
from gpumesh.bench.report.report import report_html
from gpumesh.bench.report.sections.load_section import describe_mesh_access
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind
from tests.bench.example_results import failed_record, make_stage_run, record, result, stage, summarize_only

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \x1b]0;owned\x07\u202e"


class Page(HTMLParser):
    """Its headings, its text, its tags with their attributes; every tag is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if self._open and self._open[-1] != "style" and data.strip():
            self.words.append(data.strip())


def page(made: BenchResult, records: tuple[LoadSample, ...] = ()) -> Page:
    text = report_html(made, records)
    parsed = Page(text)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text), "it needs nothing else"
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name in attributes), tag
    return parsed


def measured(name: str = "mesh", **changes: Any) -> StageResult:
    records = [record(number, server_ms=180.0) for number in range(12)]
    return replace(summarize_only(make_stage_run(*records, of=stage(name), duration_s=3.0)), **changes)


def test_a_page_that_forbids_itself_to_load_or_run_anything() -> None:
    (policy,) = [
        attributes["content"]
        for tag, attributes in page(result(measured())).tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_was_measured_is_there() -> None:
    records = tuple(record(number, sent_s=number / 10, node=f"n{number % 2}") for number in range(12))
    parsed = page(result(measured(), notes=("stage mesh: the load generator may be what limits",)), records)
    assert parsed.words.index("Capacity") < parsed.words.index("Throughput"), "the answer comes first"
    assert parsed.headings[:3] == ["gpumesh bench: quick of qwen2.5:7b", "Throughput", "Latency"]
    assert "stage mesh: the load generator may be what limits" in parsed.words
    for words in ("2026-11-24 04:10 UTC", "NVIDIA GeForce RTX 4090; ollama 0.12.6 over sshtunnel, round trip 41.2 ms"):
        assert any(words in one for one in parsed.words), words
    assert "End-to-end of each request of stage mesh, by node" in parsed.words
    assert {"n0", "n1"} <= set(parsed.words)


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table after this heading, by the first cell of their row."""
    table = text[text.index(f"<h2>{heading}</h2>") :].partition("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return {row[0]: row[1:] for row in rows if row}


def test_with_few_stages_a_row_is_a_figure() -> None:
    stages = [measured("a"), measured("b", failed=2)]
    text = report_html(result(*stages))
    assert re.search('<th scope="col"></th><th scope="col">a</th><th scope="col">b</th>', text)
    rows = cells(text, "Throughput")
    assert (rows["requests"], rows["failed"]) == (["12", "12"], ["0", "2"])
    last_group = cells(text, "Latency")
    assert last_group["n"] == ["12", "12"]
    assert text.index(">TTFT</th>") < text.index(">end-to-end</th>")
    assert text.count("<td>p99</td>") == 1, "of the gaps only: the other samples do not allow it"


def test_a_single_stage_has_a_row_for_each_kind_of_latency() -> None:
    rows = cells(report_html(result(measured())), "Latency")
    assert rows["TTFT"][:4] == ["12", "100", "100", "–"], "12 values have no p99"  # noqa: RUF001


def test_a_long_answer_is_not_cut() -> None:
    scaling = Scaling(100.0, 114.0, 100 / 114, explanation="word " * 100 + "end")
    words = page(result(measured(), notes=("word " * 100 + "end",), scaling=scaling)).words
    assert sum(len(text) > 400 and "end" in text[-5:] for text in words) >= 2


def test_with_many_stages_a_row_is_a_stage() -> None:
    text = report_html(result(*(measured(f"c={level}", concurrency=level) for level in range(1, 9))))
    rows = cells(text, "Throughput")
    assert list(rows) == [f"c={level}" for level in range(1, 9)]
    assert rows["c=8"][:2] == ["8", "12"]
    assert cells(text, "Latency")["c=8"][-6:][3] == "–", "12 values have no p99"  # noqa: RUF001


@pytest.mark.parametrize("scenario", Scenario)
def test_each_scenario_has_its_page(scenario: Scenario) -> None:
    stages = [measured("c=1", concurrency=1), measured("c=2", concurrency=2)]
    assert page(result(*stages, scenario=scenario)).headings
    assert page(result(scenario=scenario)).headings, "also where nothing was measured"


def test_rooms_that_only_some_have() -> None:
    nodes = [
        summarize_only(make_stage_run(record(stage=name), of=stage(name, kind=StageKind.NODE, node=name)))
        for name in ("iceland", "moon")
    ]
    (mesh,) = summarize_stage(
        make_stage_run(record(), failed_record(1)), Objective(), GpuUse(2, 9, 80.0, 600.0, 1200.0, 16000)
    )
    parsed = page(result(*nodes, mesh))
    assert parsed.headings[3:] == ["Scaling", "Who served what", "GPUs", "What failed", "Conditions"]
    assert "no answer" in parsed.words
    assert "Where the loss went, in tokens/s; negative: a gain." not in parsed.words, "nobody knows"


def test_failover_shows_its_parts() -> None:
    one = summarize_only(
        make_stage_run(record(), record(1, sent_s=1.0), disturbed_s=(0.5, 1.0), disturbance="iceland drained")
    )
    parsed = page(result(one, scenario=Scenario.FAILOVER))
    assert "iceland drained" in parsed.headings
    assert "longest gap ms" in parsed.words
    assert parsed.words.count("during") == 2, "in the plot and in the table"


def test_overhead_begins_with_what_the_way_costs() -> None:
    of = stage("iceland", count=4, kind=StageKind.NODE, node="iceland")
    routes = [
        record(number, stage="iceland", route=route, tokens=1, server_ms=95.0, ttft_ms=ms)
        for number, (route, ms) in enumerate([("tunnel", 96.0), ("mesh", 97.5)] * 2)
    ]
    parsed = page(
        result(*summarize_stage(make_stage_run(*routes, of=of), Objective()), scenario=Scenario.OVERHEAD), tuple(routes)
    )
    assert parsed.headings[1] == "What the way costs"
    assert "1.50" in parsed.words
    assert "Outside the server: the way there and back" in parsed.words
    assert "Output tokens per second" not in parsed.words
    assert "Throughput" not in parsed.headings, "an answer of one token has no rate"


def test_a_sweep_is_drawn_over_concurrency() -> None:
    stages = [measured(f"c={level}", concurrency=level) for level in (1, 2, 4)]
    knee = find_knee(stages, Objective())
    assert knee is not None
    parsed = page(result(*stages, scenario=Scenario.SWEEP, knee=knee))
    assert "Output tokens per second over concurrency" in parsed.words
    lines = [attributes["class"] for tag, attributes in parsed.tags if tag == "line"]
    assert sum(kind == "line s0" for kind in lines) == 3 * 2, "rate, median wait and goodput of three levels"
    assert parsed.words.count("knee") == 2, "in the plot of the rate and in that of the waiting"
    assert not page(result(*stages, scenario=Scenario.SWEEP)).words.count("knee")


def test_a_long_run_does_not_make_a_slow_page() -> None:
    records = tuple(record(number, sent_s=float(number)) for number in range(MAX_POINTS * 3 + 1))
    text = report_html(result(measured()), records)
    assert text.count("<circle") < MAX_POINTS + 50


def test_what_hosts_say_stays_text() -> None:
    bad = failed_record(1, error=HOSTILE, node=HOSTILE)
    one = summarize_only(
        make_stage_run(record(node=HOSTILE), bad, of=stage(HOSTILE), disturbed_s=(0.1, 0.2), disturbance=HOSTILE)
    )
    made = result(one, notes=(HOSTILE,))
    (node,) = made.environment.nodes
    hostile = replace(node, name=HOSTILE, gpus=(HOSTILE,), version=HOSTILE, backend=HOSTILE, transport=HOSTILE)
    made = replace(made, environment=replace(made.environment, nodes=(hostile,), mesh=HOSTILE, platform=HOSTILE))
    made = replace(made, settings=replace(made.settings, model=HOSTILE))
    text = report_html(made, (record(stage=HOSTILE, node=HOSTILE), record(1, stage=HOSTILE, node="b")))
    parsed = Page(text)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in parsed.tags)
    assert "owned" not in text
    assert not any(sign in text for sign in ("\x1b", "\x07", "\u202e"))


def test_where_the_load_came_from() -> None:
    conditions = LoadConditions(
        Via.GATEWAY,
        own_process=True,
        generator=ProcessLoad(0.31),
        mesh=ProcessLoad(0.97),
        machine=MachineLoad(cores=4, busy=0.75, other_cpu=1.2),
        limit=Limit.MESH_BOUND,
        reason="the mesh's process used 97% of a core: it may be what limits",
    )
    measured = summarize_only(make_stage_run(record(), conditions=conditions))
    limited = result(measured)
    limited = replace(limited, environment=replace(limited.environment, via=Via.GATEWAY))
    page = Page(report_html(limited, []))
    assert "Where the load came from" in page.headings
    text = " ".join(page.words)
    assert "MESH-BOUND" in text
    assert "75% of 4 cores" in text
    assert "through its gateway" in text
    assert "Where the load came from" not in Page(report_html(result(), [])).headings
    assert describe_mesh_access(replace(limited.environment, url="http://gpu:8000")).startswith("none: http://gpu:8000")
