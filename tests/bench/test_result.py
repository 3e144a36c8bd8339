"""Results on disk: whole or not at all, there and back, and hostile when read."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.bench.gpu_meter import GpuUse
from gpumesh.bench.result import (
    BENCH_SCHEMA,
    BenchResult,
    NodeEnvironment,
    check_result_folder,
    find_newest_result,
    read_result,
    record_json,
    result_from_json,
    result_json,
    write_result,
)
from gpumesh.bench.scenarios import Scenario, StageKind
from gpumesh.bench.stats import Objective
from gpumesh.bench.summary import summarize_stage
from gpumesh.errors import UsageError
from tests.bench.made import failed_record, make_stage_run, record, result, stage, summarize_only

FILES = ["report.html", "requests.jsonl", "result.json"]
RECORDS = (record(0, server_ms=190.0), record(1, sent_s=0.3, server_ms=190.0), failed_record(2))


def full() -> BenchResult:
    """With everything in it that a result can have."""
    alone = [
        summarize_only(make_stage_run(record(stage=name), of=stage(name, kind=StageKind.NODE, node=name)))
        for name in ("iceland", "moon")
    ]
    (mesh,) = summarize_stage(make_stage_run(*RECORDS), Objective(), GpuUse(1, 9, 80.0, 300.0, 600.0, 8000))
    disturbed = summarize_only(make_stage_run(*RECORDS, disturbed_s=(0.1, 0.3), disturbance="iceland drained"))
    of = stage("iceland", kind=StageKind.NODE, node="iceland")
    routes = summarize_stage(make_stage_run(record(route="tunnel"), record(route="mesh"), of=of), Objective())
    unknown = NodeEnvironment("moon", "sshtunnel", None, "ollama", None, None, None, None, simulated=True)
    made = result(*alone, mesh, disturbed, *routes, nodes=(unknown,), notes=("a note",))
    assert made.scaling is not None
    assert made.routes
    return made


def test_there_and_back(tmp_path: Path) -> None:
    made = full()
    write_result(tmp_path / "out", made, RECORDS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert read_result(tmp_path / "out") == made
    assert read_result(tmp_path / "out" / "result.json") == made
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["schema"] == BENCH_SCHEMA
    assert document["at"] == "2026-11-24T04:10:00.000Z"
    assert document["stages"][0]["latency"]["ttft"]["p50"] is None, "one value has no percentile: unknown is null"


def test_a_line_for_each_request(tmp_path: Path) -> None:
    write_result(tmp_path / "out", full(), RECORDS)
    lines = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    first, _, last = lines
    assert first == record_json(RECORDS[0])
    assert (first["ttft_ms"], first["tpot_ms"], first["tokens"], first["tokens_per_s"]) == (100.0, 10.0, 11, 100.0)
    assert len(first["arrivals_s"]) == 11
    assert (last["outcome"], last["ttft_ms"], last["error"]) == ("failed", None, "no answer")
    assert not any("prompt" in key and key != "prompt_tokens" for key in first), "prompts are not kept"


def test_a_result_of_an_older_version_has_fewer_keys() -> None:
    """Adding keys is compatible."""
    document = result_json(full())
    for one in document["stages"]:
        del one["rates"]["loaded_tokens_per_s"]
    document["something new"] = 1
    assert result_from_json(document).stages[0].rates.loaded_tokens_per_s is None


@pytest.mark.parametrize(
    ("text", "told"),
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
def test_what_is_no_result(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        read_result(file)
    assert str(file) in caught.value.message


def test_values_of_another_kind(tmp_path: Path) -> None:
    document = result_json(full())
    for key, value in (("stages", 5), ("at", "yesterday"), ("scenario", "dance"), ("settings", None)):
        with pytest.raises(ValueError, match=r"."):
            result_from_json({**document, key: value})
    with pytest.raises(UsageError, match="cannot read"):
        read_result(tmp_path / "nowhere")


def test_a_folder_that_holds_a_result_is_left_alone(tmp_path: Path) -> None:
    write_result(tmp_path, full(), RECORDS)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(UsageError, match="holds a result already"):
        check_result_folder(tmp_path)
    with pytest.raises(UsageError, match="holds a result already"):
        write_result(tmp_path, result(), ())
    assert (tmp_path / "result.json").read_bytes() == before
    write_result(tmp_path, result(), (), force=True)
    assert read_result(tmp_path) == result()
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        check_result_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write"):
        check_result_folder(tmp_path / "file" / "below")
    check_result_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_there_is_never_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the last file takes its place."""
    real = os.replace

    def interrupted(source: str, target: Path) -> None:
        if target.name == "result.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_result(tmp_path, full(), RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "requests.jsonl"]
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 3


def test_files_may_be_read_by_others(tmp_path: Path) -> None:
    """They hold no secret, and a report is made to be shown."""
    write_result(tmp_path, full(), RECORDS)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


def test_the_newest(tmp_path: Path) -> None:
    assert find_newest_result(tmp_path) is None
    assert find_newest_result(tmp_path / "nowhere") is None
    for number, name in enumerate(("second", "first")):
        write_result(tmp_path / name, result(), ())
        os.utime(tmp_path / name / "result.json", (1000 - number, 1000 - number))
    (tmp_path / "not yet done").mkdir()
    assert find_newest_result(tmp_path) == tmp_path / "second"


def test_what_failed_in_all() -> None:
    made = result(
        summarize_only(make_stage_run(record(), failed_record(1))),
        summarize_only(make_stage_run(failed_record(0), failed_record(1))),
    )
    assert made.failed == 3
    assert not made.simulated
    assert replace(full(), scenario=Scenario.SWEEP).simulated
