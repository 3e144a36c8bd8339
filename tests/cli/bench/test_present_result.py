"""What `bench run` prints at its end: before its files are written, also on a full disk and after an early end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer

from gpumesh.bench.result_folder import read_result
from gpumesh.bench.result_journal import ResultJournal
from gpumesh.cli.bench import present_result
from gpumesh.errors import GPUMeshError, MeshNotRunning
from tests.bench.example_results import RECORDS, files_limited_to, full_result

WHOLE = full_result()
PARTIAL = replace(WHOLE, partial=True)


def test_a_full_disk_does_not_keep_the_table_from_the_person(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = ResultJournal(tmp_path)
    with files_limited_to(10):
        journal.keep(WHOLE, RECORDS)
        with pytest.raises(GPUMeshError, match="not written: 3 of 3 requests and the figures of iceland, moon, mesh"):
            present_result.present_result(journal, tmp_path, as_json=False, quiet=False)
    printed = capsys.readouterr()
    assert printed.out.startswith("STAGE")
    assert "result in" not in printed.err


def test_an_early_end_on_a_full_disk_tells_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = ResultJournal(tmp_path)
    with files_limited_to(10):
        journal.keep(PARTIAL, RECORDS)
        present_result.present_partial_result(journal, tmp_path, KeyboardInterrupt(), as_json=False, quiet=True)
    printed = capsys.readouterr()
    assert "Partial result: interrupted by Ctrl-C." in printed.out
    assert "error: cannot write to" in printed.err


def test_an_early_end_is_in_the_table_and_in_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = ResultJournal(tmp_path)
    journal.keep(PARTIAL, RECORDS)
    error = MeshNotRunning("the mesh was killed")
    present_result.present_partial_result(journal, tmp_path, error, as_json=True, quiet=False)
    printed = capsys.readouterr()
    assert '"partial_reason": "the mesh was killed"' in printed.out
    assert f"partial result in {tmp_path}" in printed.err
    assert read_result(tmp_path).partial_reason == "the mesh was killed"


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (KeyboardInterrupt(), "interrupted by Ctrl-C"),
        (typer.Exit(130), "interrupted by Ctrl-C"),
        (SystemExit(143), "ended by SIGTERM"),
        (SystemExit(129), "ended by SIGHUP"),
        (SystemExit(3), "ended by an error (SystemExit)"),
        (RuntimeError("x"), "ended by an error (RuntimeError)"),
        (MeshNotRunning("no mesh"), "no mesh"),
    ],
)
def test_what_ended_a_run(end: BaseException, text: str) -> None:
    assert present_result.describe_end(end) == text
