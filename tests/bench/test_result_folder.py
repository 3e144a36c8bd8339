"""Results on disk: complete or absent, read back unchanged, and validated when read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gpumesh.bench.result_folder import check_result_folder, find_newest_result, read_result
from gpumesh.bench.results.result import BENCH_SCHEMA, records_json
from gpumesh.errors import UsageError
from tests.bench.example_results import RECORDS, full_result, result, write_result

FILES = ["report.html", "requests.jsonl", "result.json"]


def test_a_written_result_is_read_back_unchanged(tmp_path: Path) -> None:
    made = full_result()
    write_result(tmp_path / "out", made, RECORDS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert read_result(tmp_path / "out") == made
    assert read_result(tmp_path / "out" / "result.json") == made
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["schema"] == BENCH_SCHEMA
    assert document["at"] == "2026-11-24T04:10:00.000Z"
    assert document["stages"][0]["latency"]["ttft"]["p50"] is None, "one value has no percentile: unknown is null"


def test_requests_jsonl_has_a_line_for_each_request(tmp_path: Path) -> None:
    write_result(tmp_path / "out", full_result(), RECORDS)
    lines = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    first, _, last = lines
    assert first == records_json(RECORDS)[0]
    assert (first["ttft_ms"], first["tpot_ms"], first["tokens"], first["tokens_per_s"]) == (100.0, 10.0, 11, 110.0)
    assert len(first["arrivals_s"]) == 11
    assert (last["outcome"], last["ttft_ms"], last["error"]) == ("failed", None, "no answer")
    assert not any("prompt" in key and key != "prompt_tokens" for key in first), "prompts are not kept"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a result"),
        ("[]", "not an object"),
        ("{}", "its schema is None"),
        ('{"schema": "gpumesh.bench/2"}', "gpumesh.bench/2"),
        ('{"schema": "gpumesh.bench/1"}', "not a result"),
        ("[" * 100_000, "not a result"),
        ("\x00", "not a result"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_result(file)
    assert str(file) in caught.value.message


def test_a_folder_with_a_result_is_not_overwritten_without_force(tmp_path: Path) -> None:
    write_result(tmp_path, full_result(), RECORDS)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(UsageError, match="holds a result already"):
        check_result_folder(tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before
    check_result_folder(tmp_path, force=True)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        check_result_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write"):
        check_result_folder(tmp_path / "file" / "below")
    check_result_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_files_may_be_read_by_others(tmp_path: Path) -> None:
    """They hold no secret, and a report is made to be shown."""
    write_result(tmp_path, full_result(), RECORDS)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


def test_find_newest_result(tmp_path: Path) -> None:
    assert find_newest_result(tmp_path) is None
    assert find_newest_result(tmp_path / "nowhere") is None
    for number, name in enumerate(("second", "first")):
        write_result(tmp_path / name, result(), ())
        os.utime(tmp_path / name / "result.json", (1000 - number, 1000 - number))
    (tmp_path / "not yet done").mkdir()
    assert find_newest_result(tmp_path) == tmp_path / "second"
