"""Several runs in one folder: what is on the disk after each of them, and after an early end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.bench.repeated_journal import RepeatedJournal
from gpumesh.bench.result_folder import check_result_folder, find_results, read_result
from gpumesh.bench.results.joint import join_runs
from gpumesh.errors import GPUMeshError, UsageError
from tests.bench.example_results import RECORDS, files_limited_to, full_result, write_result

WHOLE = full_result()
AT_START = replace(WHOLE, stages=(), scaling=None, routes=(), partial=True)
ONE_STAGE = replace(AT_START, stages=WHOLE.stages[:1])
ONLY_THIS = replace(WHOLE, stages=WHOLE.stages[:1], scaling=None, routes=())


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run_through(journal: RepeatedJournal) -> None:
    """A run that comes to its end."""
    journal.keep(AT_START, ())
    journal.keep(ONE_STAGE, RECORDS[:1])
    journal.keep(WHOLE, RECORDS)


def test_each_run_has_a_folder_and_the_joint_result_stands_above(tmp_path: Path) -> None:
    journal = RepeatedJournal(tmp_path)
    run_through(journal)
    assert read_result(tmp_path) == WHOLE, "one run is its own joint result"
    run_through(journal)
    journal.finish()
    assert names(tmp_path) == [
        *("report.html", "result.json"),
        *(f"run-{number}/{name}" for number in (1, 2) for name in ("report.html", "requests.jsonl", "result.json")),
    ]
    assert read_result(tmp_path) == journal.result == join_runs([WHOLE, WHOLE])
    assert read_result(tmp_path / "run-2") == WHOLE


def test_a_run_that_ends_early_leaves_the_whole_ones_joint_and_itself_apart(tmp_path: Path) -> None:
    journal = RepeatedJournal(tmp_path)
    run_through(journal)
    journal.keep(AT_START, ())
    journal.keep(ONE_STAGE, RECORDS[:1])
    journal.end_early("interrupted by Ctrl-C")
    journal.finish()
    joint = read_result(tmp_path)
    assert (joint.stages, joint.partial, joint.partial_reason) == (WHOLE.stages, True, "interrupted by Ctrl-C")
    second = read_result(tmp_path / "run-2")
    assert (len(second.stages), second.partial_reason) == (1, "interrupted by Ctrl-C")


def test_a_first_run_that_ends_early_is_the_result(tmp_path: Path) -> None:
    folder = tmp_path / "20261124-041000-quick"
    journal = RepeatedJournal(folder)
    journal.keep(AT_START, ())
    assert not journal.holds_figures
    journal.keep(ONE_STAGE, RECORDS[:1])
    journal.end_early("interrupted by Ctrl-C")
    journal.finish()
    assert journal.holds_figures
    assert read_result(folder) == journal.result == ONE_STAGE.end_early("interrupted by Ctrl-C")
    assert find_results(tmp_path) == [folder]


def test_runs_that_measured_nothing_leave_nothing(tmp_path: Path) -> None:
    journal = RepeatedJournal(tmp_path)
    journal.keep(AT_START, ())
    journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_older_runs_are_written_over_only_on_demand_and_none_of_them_stays(tmp_path: Path) -> None:
    older = RepeatedJournal(tmp_path)
    for _ in range(3):
        run_through(older)
    (tmp_path / "run-3" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds a result already"):
        check_result_folder(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(UsageError, match="run-1, run-2, run-3"):
        check_result_folder(tmp_path)
    newer = RepeatedJournal(tmp_path)
    newer.keep(AT_START, ())
    assert read_result(tmp_path / "run-3") == WHOLE, "nothing is removed before there is something new"
    newer.keep(ONLY_THIS, RECORDS)
    newer.finish()
    assert read_result(tmp_path) == ONLY_THIS
    assert names(tmp_path) == [
        "report.html",
        "result.json",
        *(f"run-1/{name}" for name in ("report.html", "requests.jsonl", "result.json")),
        "run-3/notes.txt",
    ]


def test_an_older_single_result_is_replaced(tmp_path: Path) -> None:
    write_result(tmp_path, ONLY_THIS, RECORDS)
    journal = RepeatedJournal(tmp_path)
    run_through(journal)
    assert read_result(tmp_path) == WHOLE
    assert not (tmp_path / "requests.jsonl").exists(), "these would be other requests"


def test_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    journal = RepeatedJournal(tmp_path)
    with files_limited_to(100):
        run_through(journal)
        run_through(journal)
        with pytest.raises(GPUMeshError, match="cannot write to"):
            journal.finish()
    assert journal.result == join_runs([WHOLE, WHOLE])
    with pytest.raises(GPUMeshError, match="run-1"):  # there is room again, but the first runs are not whole
        journal.finish()
    assert read_result(tmp_path) == join_runs([WHOLE, WHOLE])
