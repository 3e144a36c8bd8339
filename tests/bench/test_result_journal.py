"""A result that grows: what is on the disk after each stage, after a full disk, and after the end of the run."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.bench.result_folder import read_result
from gpumesh.bench.result_journal import ResultJournal
from gpumesh.bench.results.result import records_json
from gpumesh.errors import GPUMeshError
from tests.bench.example_results import RECORDS, files_limited_to, full_result, record, result, write_result

WHOLE = full_result()
AT_START = replace(WHOLE, stages=(), scaling=None, routes=(), partial=True)
ONE_STAGE = replace(AT_START, stages=WHOLE.stages[:1])


def request_lines(folder: Path) -> list[object]:
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def test_each_stage_is_on_the_disk_as_soon_as_it_is_kept(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path)
    journal.keep(AT_START, ())
    assert read_result(tmp_path) == AT_START, "the settings are there at once"
    assert request_lines(tmp_path) == []
    journal.keep(ONE_STAGE, RECORDS[:1])
    assert read_result(tmp_path) == ONE_STAGE
    assert "Partial result" in (tmp_path / "report.html").read_text()
    journal.keep(WHOLE, RECORDS)
    journal.finish()
    assert read_result(tmp_path) == WHOLE
    assert request_lines(tmp_path) == records_json(RECORDS), "each once"
    assert "Partial result" not in (tmp_path / "report.html").read_text()


def test_what_ended_the_run_early_is_in_the_files(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path)
    journal.keep(ONE_STAGE, RECORDS)
    journal.end_early("interrupted by Ctrl-C")
    journal.finish()
    read = read_result(tmp_path)
    assert (read.partial, read.partial_reason) == (True, "interrupted by Ctrl-C")
    assert "interrupted by Ctrl-C" in (tmp_path / "report.html").read_text()
    assert len(request_lines(tmp_path)) == len(RECORDS)


def test_an_older_result_stays_until_there_are_new_figures(tmp_path: Path) -> None:
    older = result()
    write_result(tmp_path, older, RECORDS)
    journal = ResultJournal(tmp_path)
    journal.keep(AT_START, RECORDS[:1])
    assert read_result(tmp_path) == older
    journal.discard()
    assert read_result(tmp_path) == older
    journal.keep(ONE_STAGE, RECORDS[:2])
    assert read_result(tmp_path) == ONE_STAGE
    assert len(request_lines(tmp_path)) == 2, "those of the warm-up too, and none of the older result"


def test_a_run_without_figures_leaves_no_files(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path)
    journal.keep(AT_START, RECORDS[:1])
    assert not journal.holds_figures
    journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_nothing_that_was_written_and_says_what_is_lost(tmp_path: Path) -> None:
    journal = ResultJournal(tmp_path)
    journal.keep(ONE_STAGE, RECORDS)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_limited_to(len(written["requests.jsonl"]) + 10):
        journal.keep(WHOLE, [*RECORDS, record(7)])
        with pytest.raises(GPUMeshError) as caught:
            journal.finish()
    assert os.strerror(errno.EFBIG).lower() in caught.value.message.lower()
    assert "not written: 1 of 4 requests and the figures of moon, mesh, iceland" in caught.value.message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written, "no half lines, no other files"
    journal.finish()  # somebody has made room
    assert read_result(tmp_path) == WHOLE
    assert len(request_lines(tmp_path)) == 4


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a file takes its place."""
    journal = ResultJournal(tmp_path)
    journal.keep(ONE_STAGE, RECORDS)
    real = os.replace

    def interrupted(source: str, target: Path) -> None:
        if target.name == "result.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.keep(WHOLE, RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "requests.jsonl", "result.json"]
    assert read_result(tmp_path) == ONE_STAGE
