"""`gpumesh bench show|list|compare|export` on results that lie on the disk."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from gpumesh.bench.repeated_journal import RepeatedJournal
from gpumesh.bench.results.result import BenchResult
from tests.bench.comparison.test_compare import measured, repeated
from tests.bench.example_results import RECORDS, result, write_result
from tests.cli.in_process import invoke

WIDE = {"COLUMNS": "200"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a state folder in it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keep(name: str, made: BenchResult) -> Path:
    """Writes the result to the state folder, where `bench run` writes it without --out."""
    folder = Path("state/gpumesh/bench") / name
    if made.runs:
        journal = RepeatedJournal(folder)
        for run in made.runs:
            journal.keep(run, RECORDS)
        journal.finish()
    else:
        write_result(folder, made, RECORDS)
    return folder


def test_results_are_listed_with_the_latest_first() -> None:
    assert "nothing was measured yet" in invoke("bench", "list").err
    older = result(measured())
    keep("older", older)
    newer = replace(repeated(10.0, 11.0), at=older.at + timedelta(hours=1))
    keep("newer", replace(newer, runs=tuple(replace(run, at=newer.at) for run in newer.runs)))
    lines = invoke("bench", "list").out.splitlines()
    assert lines[0].split() == ["RESULT", "WHEN", "SCENARIO", "MODEL", "NODES", "RUNS", "TOK/S"]
    assert [line.split()[0] for line in lines[2:]] == ["newer", "older"]
    assert lines[2].split()[1:-1] == ["2026-11-24", "05:10", "quick", "qwen2.5:7b", "iceland", "2"]
    document = json.loads(invoke("bench", "list", "-o", "json").out)
    assert document["schema"] == "gpumesh.bench-list/1"
    assert [row["name"] for row in document["results"]] == ["newer", "older"]
    assert document["results"][1]["tokens_per_s"] == older.stages[0].rates.best_tokens_per_s
    assert invoke("bench", "list", "-o", "name").out == "newer\nolder\n"


def test_a_broken_result_hides_no_other() -> None:
    keep("fine", result(measured()))
    broken = keep("broken", result(measured())) / "result.json"
    broken.write_text("{}")
    ended = invoke("bench", "list")
    assert [line.split()[0] for line in ended.out.splitlines()[2:]] == ["fine"]
    assert "broken/result.json is not a result" in ended.err
    assert invoke("-q", "bench", "list").err == ""


def test_a_result_is_found_by_its_name_in_the_list() -> None:
    keep("first", result(measured()))
    latest = keep("second", result(measured("other")))
    os.utime(latest / "result.json", (2e9, 2e9))
    assert "mesh" in invoke("bench", "show", "first").out
    assert "other" in invoke("bench", "show").out
    assert "cannot read" in invoke("bench", "show", "nowhere", code=2).err


def test_a_comparison_as_table_and_as_json() -> None:
    keep("a", repeated(10.0, 10.1, 9.9, 10.05))
    keep("b", repeated(12.0, 12.1, 11.9, 12.05))
    ended = invoke("bench", "compare", "a", "b")
    lines = ended.out.splitlines()
    assert lines[0].split() == ["STAGE", "FIGURE", "A", "B", "CHANGE", "INTERVAL", "VERDICT"]
    (tpot,) = (line.split() for line in lines if "tpot p50" in line)
    assert tpot[-1] == "worse"
    assert "+20.0" in tpot
    assert lines[-1].startswith("B against A, ")
    assert "note: by the spread between 4 runs of A and 4 of B" in ended.err
    found = json.loads(invoke("bench", "compare", "a", "b", "--json").out)
    assert found["schema"] == "gpumesh.bench-compare/1"
    assert (found["basis"], found["runs_a"], found["unlike"]) == ("between-runs", 4, [])
    assert "gate" not in found


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_a_comparison_fits_a_narrow_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    keep("a", repeated(10.0, 10.1))
    lines = invoke("bench", "compare", "a", "a").out.splitlines()
    assert max(map(len, lines[:-1])) <= int(columns)
    assert "VERDICT" in lines[0]
    assert "CHANGE" in lines[0]


def test_unlike_results_are_compared_only_by_force() -> None:
    keep("a", result(measured()))
    other = replace(result(measured()), settings=replace(result().settings, tokens=128, seed=2))
    keep("b", other)
    refused = invoke("bench", "compare", "a", "b", code=2)
    assert refused.out == ""
    assert "not the same tokens: 64 and 128; not the same seed: 1 and 2" in refused.err
    forced = invoke("bench", "compare", "a", "b", "--force")
    assert "note: not the same tokens: 64 and 128" in forced.err


def test_a_gate_fails_with_its_reasons() -> None:
    keep("a", repeated(10.0, 10.1, 9.9, 10.05))
    keep("b", repeated(12.0, 12.1, 11.9, 12.05))
    failed = invoke("bench", "compare", "a", "b", "--gate", "5%", code=1)
    assert "gate: mesh, tpot p50: worse by 20.0 %" in failed.err
    document = json.loads(invoke("bench", "compare", "a", "b", "--gate", "5%", "--json", code=1).out)
    assert document["gate"]["limit"] == 0.05
    assert any("tpot p50" in failure for failure in document["gate"]["failures"])
    invoke("bench", "compare", "b", "a", "--gate", "5%")
    invoke("bench", "compare", "a", "b", "--gate", "50%")
    assert "no percentage" in invoke("bench", "compare", "a", "b", "--gate", "five", code=2).err


def test_a_gate_says_what_it_cannot_tell() -> None:
    keep("a", result(measured(count=3)))
    undecided = invoke("bench", "compare", "a", "a", "--gate", "5%")
    assert "may be worse by more than 5 %, but it is not sure" in undecided.err


def test_a_report_of_a_comparison(home: Path) -> None:
    keep("a", repeated(10.0, 10.1))
    invoke("bench", "compare", "a", "a", "--report", "page.html")
    assert "gpumesh bench compare" in (home / "page.html").read_text()
    assert "cannot write" in invoke("bench", "compare", "a", "a", "--report", "no/page.html", code=2).err


def test_exports() -> None:
    assert "nothing was measured yet" in invoke("bench", "export", code=2).err
    keep("a", repeated(10.0, 10.1))
    rows = invoke("bench", "export").out.splitlines()
    assert rows[0].startswith("run,stage,kind,")
    assert [row.split(",")[0] for row in rows[1:]] == ["all", "1", "2"]
    assert "| mesh |" in invoke("bench", "export", "a", "--format", "markdown").out
