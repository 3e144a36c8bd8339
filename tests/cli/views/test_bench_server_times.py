"""The servers' own times of a result, as they are printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.node_shares import ColdStart
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.report.sections.server_times import server_times_html
from gpumesh.cli.views.bench_server_times import MAX_ROWS, print_server_times
from tests.bench.example_results import make_stage_run, record, result, stage, summarize_only

COUNTERS = ServerCounters(prompt_tokens=300, total_ms=480.0, load_ms=20.0, prompt_ms=100.0, eval_ms=100.0)


def stage_of(name: str, *nodes: str) -> StageResult:
    records = [
        record(number, node=node, counters=COUNTERS, prompt_tokens=300, sent_s=0.1 * step, ended_s=0.1 * step + 0.5)
        for number, node in enumerate(nodes)
        for step in range(2)
    ]
    return summarize_only(make_stage_run(*records, of=stage(name, concurrency=4)))


def test_a_row_for_each_node_and_the_clock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    no_clock = summarize_only(make_stage_run(record(node="gamma"), of=stage("c=1")))
    made = result(no_clock, stage_of("c=2", "alpha", "beta"), cold_starts=(ColdStart("warm-up", "beta", 2100.0),))
    print_server_times(made)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["c=2:", "alpha", "2", "110", "3,000", "260", "260", "20.0", "0"],
        ["c=2:", "beta", "2", "110", "3,000", "260", "260", "20.0", "0"],
    ]
    assert lines[4:] == [
        "TPOT in c=1: arrivals",
        "TPOT in c=2: the server's clock",
        "warm-up: beta loaded the model in 2.1 s",
    ]
    page = server_times_html(made)
    assert "c=2: alpha" in page
    assert "gamma" not in page, "it tells nothing"
    assert "2.10" in page
    assert server_times_html(result(no_clock)) == ""


def test_of_many_rows_those_of_the_last_stage(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [f"n{number}" for number in range(MAX_ROWS)]
    stages = [stage_of("c=1", *nodes), replace(stage_of("c=2", "alpha"), name="c=2")]
    print_server_times(result(*stages))
    out = capsys.readouterr().out
    assert "c=2: alpha" in out
    assert "n0" not in out
    assert f"1 of {MAX_ROWS + 1} rows: all are in the report" in out
