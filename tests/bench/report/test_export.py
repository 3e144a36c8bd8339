"""A result as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from gpumesh.bench.report.export import result_csv, result_markdown
from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.workload.settings import BenchSettings
from tests.bench.comparison.test_compare import measured
from tests.bench.example_results import full_result, result


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_for_each_stage_with_all_figures() -> None:
    made = measured(gap_ms=10.0)
    (row,) = rows_of(result_csv(result(made)))
    assert (row["run"], row["stage"], row["in_flight"], row["served"]) == ("1", "mesh", "1", "20")
    assert float(row["tpot_ms_p50"]) == 10.0
    interval = made.intervals.loaded_tokens_per_s
    assert interval is not None
    assert float(row["loaded_tokens_per_s_low"]) == float(f"{interval.low:.6g}")
    assert row["tokens_per_joule"] == row["power_w"] == "", "what is unknown is empty"


def test_csv_has_the_runs_of_a_repeated_result() -> None:
    joint = join_runs([result(measured(gap_ms=gap_ms)) for gap_ms in (10.0, 12.0)])
    rows = rows_of(result_csv(joint))
    assert [row["run"] for row in rows] == ["all", "1", "2"]
    assert [float(row["tpot_ms_p50"]) for row in rows[1:]] == [10.0, 12.0]


def test_every_optional_part_is_written() -> None:
    rows = rows_of(result_csv(full_result()))
    assert [row["stage"] for row in rows] == [stage.name for stage in full_result().stages]
    assert {row["route"] for row in rows} == {"", "tunnel", "mesh"}
    assert rows_of(result_csv(result())) == []


def test_a_name_cannot_become_a_formula_or_a_line() -> None:
    hostile = replace(measured(), name='=HYPERLINK("http://x")\r\n+1')
    (row,) = rows_of(result_csv(result(hostile)))
    assert row["stage"] == '\'=HYPERLINK("http://x") +1'


def test_markdown_is_a_table_with_intervals_and_conditions() -> None:
    text = result_markdown(replace(result(measured()), notes=("a note",)))
    lines = text.splitlines()
    assert lines[0] == "**gpumesh bench: quick of qwen2.5:7b** (2026-11-24 04:10 UTC)"
    (row,) = (line for line in lines if line.startswith("| mesh"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["mesh", "1", "20", "0"]
    assert cells[4] == "102 (101–103)"  # noqa: RUF001  # the dash of ranges
    assert lines[-2:] == [
        "- iceland: NVIDIA GeForce RTX 4090; ollama 0.12.6",
        "- note: a note",
    ]
    header, dashes = (line for line in lines if line.startswith(("| stage", "|---")))
    assert header.count("|") == dashes.count("|") == row.count("|")


def test_a_name_cannot_become_markup() -> None:
    hostile = replace(measured(), name="a|b\n<img src=x>`*[x](y)")
    settings = BenchSettings("m|<b>")
    text = result_markdown(replace(result(hostile), settings=settings))
    assert "a\\|b \\<img src=x\\>\\`\\*\\[x\\]\\(y\\)" in text
    assert "m\\|\\<b\\>" in text


def test_markdown_of_several_runs_says_how_many() -> None:
    joint = join_runs([result(measured()), result(measured())])
    assert "UTC, 2 runs)" in result_markdown(joint).splitlines()[0]
