"""`gpumesh batch` on the real store: what it prints, its exit codes, and a batch that a mesh works on while it is
watched."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.values import Claim, Result
from gpumesh.daemon import paths
from tests.cli.in_process import invoke
from tests.cli.meshes import MODEL, SimulatedMesh

MESH_YAML = "version: 1\nname: tested\nnodes:\n  - {name: alpha, backend: {url: 'http://127.0.0.1:9'}}\n"
CHAT = "/v1/chat/completions"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mesh.yaml whose mesh does not run. The working folder is empty."""
    file = tmp_path / "mesh.yaml"
    file.write_text(MESH_YAML)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("GPUMESH_CONFIG", str(file))
    for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return file


def submit(text: str, *options: str, name: str = "in.jsonl", code: int = 0) -> str:
    """Submits a file of this text. Returns the id of the batch."""
    Path(name).write_text(text)
    return invoke("batch", "submit", name, "-q", *options, code=code).out.strip()


def work(config: Path, count: int, *, failed: Collection[int] = ()) -> list[Claim]:
    """Answers ``count`` requests of the oldest batch as a mesh would; those at the lines ``failed`` without success."""

    async def answer() -> list[Claim]:
        async with SqliteBatchStore(paths.for_config(config).batches) as store:
            await store.begin_work("worker")
            claims = await store.claim("worker", count, lease_s=30.0)
            for claim in claims:
                content = json.dumps({"line": claim.line, "error": "no" if claim.line in failed else None}).encode()
                await store.record("worker", [Result(claim, content, failed=claim.line in failed)])
            return claims

    return asyncio.run(answer())


def claim(config: Path, count: int) -> list[Claim]:
    """Begins ``count`` requests of the oldest batch as a mesh would."""

    async def begin() -> list[Claim]:
        async with SqliteBatchStore(paths.for_config(config).batches) as store:
            return await store.claim("worker", count, lease_s=30.0)

    return asyncio.run(begin())


def lines_of(text: str) -> list[int]:
    return [json.loads(line)["line"] for line in text.splitlines()]


def shown(*words: str) -> dict[str, Any]:
    (entry,) = json.loads(invoke("batch", *words, "--json").out)["batches"]
    return dict(entry)


def test_a_batch_from_its_file_to_its_results(config: Path) -> None:
    assert "there are no batches" in invoke("batch").out
    assert "there are no batches" in invoke("batch", "show", code=2).err
    Path("in.txt").write_text("one\n\ntwo\nthree\n")
    submitted = invoke("batch", "submit", "in.txt", "-m", MODEL, "--window", "8h")
    batch = submitted.out.strip()
    assert submitted.err.splitlines() == [
        f"3 prompts, to be answered within 8h: `gpumesh batch show {batch} --watch` shows how far they are",
        "no mesh is running to work on batches: `gpumesh up -d` starts it",
    ]
    assert invoke("batch", "list", "-o", "name").out == f"{batch}\n"
    assert json.loads(invoke("batch", "--json").out)["batches"][0]["id"] == batch
    assert "hint: `gpumesh batch show --json`" in invoke("batch", "--json", "show", code=2).err
    assert f"{batch}  ◐ in progress   0 %" in invoke("batch").out
    claims = work(config, 2, failed={3})
    assert [json.loads(claim.content) for claim in claims] == [
        {"prompt": "one", "model": MODEL},
        {"prompt": "two", "model": MODEL},
    ]
    entry = shown("show", batch[:12])
    assert [entry[key] for key in ("name", "status", "total", "completed", "failed")] == [
        "in.txt",
        "in_progress",
        3,
        1,
        1,
    ]
    assert entry["rate_per_s"] > 0.0
    assert entry["left_s"] > 0.0
    partly = invoke("batch", "results", code=1)
    assert lines_of(partly.out) == [1, 3]
    assert partly.err.splitlines() == [f"{batch} is in progress: 1 of 3 have no result yet", "1 request failed"]
    assert lines_of(invoke("batch", "results", batch, "--failed").out) == [3]
    work(config, 1)
    ended = invoke("batch", "results", "--follow", "-o", "out.jsonl", code=1)
    assert lines_of(Path("out.jsonl").read_text()) == [1, 3, 4]
    assert "3 results written to out.jsonl" in ended.err
    assert "out.jsonl is there already" in invoke("batch", "results", "-o", "out.jsonl", code=2).err
    assert invoke("batch", "retry", batch, "-q").out == f"{batch}: 1 of 3 requests to be sent again\n"
    work(config, 1)
    assert lines_of(invoke("batch", "results", "-q").out) == [1, 3, 4]
    assert "nothing to send again" in invoke("batch", "retry", batch).out
    assert invoke("batch", "rm", batch).out == f"{batch} is removed\n"
    with sqlite3.connect(paths.for_config(config).batches) as database:
        assert database.execute("SELECT count(*) FROM files WHERE state = 1").fetchone() == (0,)


def test_show_says_why_requests_failed_and_which_batch_is_first(config: Path) -> None:
    first = submit("one\ntwo\nthree\nfour\n", name="first.txt")
    assert shown("show")["errors_seen"] == []
    second = submit("one\n", name="second.txt")
    assert shown("show", second)["waits_behind"] is None  # no mesh works on the older batch
    assert len(claim(config, 1)) == 1
    assert (shown("show", second)["waits_behind"], shown("show", first)["waits_behind"]) == (first, None)
    waiting = " ".join(invoke("batch", "show", second).out.split())  # whatever the width of the terminal
    assert f"waits behind {first}; batches run one after the other" in waiting
    assert "rate " not in waiting
    work(config, 2, failed={1, 2})
    entry = shown("show", first)
    assert entry["errors_seen"] == [{"message": "no", "count": 2}]
    assert "failed     2: no" in invoke("batch", "show", first).out


def test_wrong_lines_are_told_by_their_numbers_and_the_others_are_sent(config: Path) -> None:
    good = [json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": {"model": "m"}}) for name in "abc"]
    Path("in.jsonl").write_text("\n".join([good[0], "{broken", good[1], good[0], "5", good[2]]))
    submitted = invoke("batch", "submit", "in.jsonl", "-m", MODEL, code=3)
    wrong = submitted.err.splitlines()[:3]
    assert [line.split(": ")[0] for line in wrong] == ["in.jsonl:2", "in.jsonl:4", "in.jsonl:5"]
    assert "line 1 has the same custom_id" in wrong[1]
    assert "3 requests, to be answered within 24h; 3 wrong lines left out" in submitted.err
    entry = shown("show")
    assert (entry["endpoint"], entry["total"], entry["wrong_lines"]) == (CHAT, 3, 3)
    assert [error["line"] for error in entry["errors"]] == [2, 4, 5]
    assert "wrong      line 2: not JSON" in invoke("batch", "show").out
    assert {json.loads(claim.content)["body"]["model"] for claim in work(config, 9)} == {MODEL}


def test_a_file_that_cannot_be_submitted_leaves_nothing(config: Path) -> None:
    assert "cannot read none.txt: No such file" in invoke("batch", "submit", "none.txt", code=2).err
    assert "cannot read .: Is a directory" in invoke("batch", "submit", ".", code=2).err
    Path("in.jsonl").write_text('{"promt": 1}\n' * 50)
    lines = invoke("batch", "submit", "in.jsonl", code=2).err.splitlines()
    assert lines[:2] == ["error: in.jsonl has no line that can be sent", "in.jsonl:1: unknown key 'promt'"]
    assert lines[-1] == "… and 30 more"
    Path("in.txt").write_text("\n \n")
    assert "in.txt has no prompts" in invoke("batch", "submit", "in.txt", code=2).err
    assert "no node 'beta'" in invoke("batch", "submit", "in.txt", "--node", "beta", code=2).err
    assert "is no duration" in invoke("batch", "submit", "in.txt", "--window", "soon", code=2).err
    assert invoke("batch", "list", "--json").out.split() == [
        "{",
        '"schema":',
        '"gpumesh.batch/1",',
        '"batches":',
        "[]",
        "}",
    ]
    with sqlite3.connect(paths.for_config(config).batches) as database:
        assert database.execute("SELECT count(*) FROM files WHERE state = 1").fetchone() == (0,)


def test_an_error_with_one_batch_does_not_stop_the_others(config: Path) -> None:
    first, second = submit("one\ntwo\n", name="a.txt"), submit("one\n", name="b.txt")
    going = invoke("batch", "rm", first, second, "batch_none", code=2)
    assert going.out == ""
    assert f"{first} has not ended yet" in going.err
    assert f"`gpumesh batch cancel {second}` ends it" in going.err
    assert "there is no batch 'batch_none'" in going.err
    work(config, 1)
    cancelled = invoke("batch", "cancel", first, "none", second, code=2)
    assert cancelled.out.splitlines() == [
        f"{first} is cancelled: 1 of 2 requests have a result",
        f"{second} is cancelled: 0 of 1 requests have a result",
    ]
    assert invoke("batch", "cancel", first).out == f"{first} is cancelled already\n"
    followed = invoke("batch", "results", first, "--follow", code=1)
    assert f"{first} is cancelled: 1 of 2 have no result" in followed.err
    assert invoke("batch", "rm", first, second).out == f"{first} is removed\n{second} is removed\n"


def test_an_id_may_be_cut_and_the_latest_needs_none(config: Path) -> None:
    ids = [submit("one\n", name=f"{number}.txt") for number in range(2)]
    assert shown("show")["id"] == ids[1]
    assert shown("show", ids[0].removeprefix("batch_")[:8])["id"] == ids[0]
    assert "there is no batch 'batch_'" in invoke("batch", "show", "batch_", code=2).err
    assert "there is no batch 'x'" in invoke("batch", "results", "x", code=2).err


def test_the_store_cannot_be_used(config: Path) -> None:
    file = paths.for_config(config).batches
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no database" * 1000)
    for words in (["list"], ["show"], ["results"], ["cancel", "x"]):
        assert f"the store of batches {file} cannot be used" in invoke("batch", *words, code=1).err
    assert file.read_bytes() == b"no database" * 1000


def test_redis_is_away(config: Path) -> None:
    config.write_text(f"{MESH_YAML}redis: {{url: 'redis://127.0.0.1:9/0'}}\n")
    Path("in.txt").write_text("one\n")
    for words in (["submit", "in.txt"], ["list"], ["results", "--follow"]):
        assert "Redis at 127.0.0.1:9 cannot be used for batches" in invoke("batch", *words, code=1).err


async def test_a_mesh_works_on_a_batch_while_it_is_watched(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    prompts = "".join(f"Why is {number} a number?\n" for number in range(40))
    batch = (await gpumesh("batch", "submit", "-", "--name", "numbers", stdin=prompts)).out.strip()
    await gpumesh("up", "-d")
    watched = await gpumesh("batch", "show", batch, "--watch")
    assert "completed" in watched.out
    assert "40 of 40" in watched.out
    assert "no mesh is running" not in watched.err
    assert (await gpumesh("batch", "results", "--failed")).err == f"{batch} has no failed results\n"
    results = (await gpumesh("batch", "results", batch)).lines()
    assert [result["index"] for result in results] == list(range(40))
    assert [result["prompt"] for result in results] == prompts.splitlines()
    assert all(result["response"] and result["error"] is None for result in results)
    missing = await gpumesh("batch", "submit", "-", "-m", "qwen2.5:70b", stdin="one\n")
    assert "no node that is up has the model 'qwen2.5:70b' now" in missing.err
    assert f"did you mean {MODEL}" in missing.err
    failed = (await gpumesh("batch", "results", missing.out.strip(), "--follow", code=1)).lines()
    assert ["qwen2.5:70b" in result["error"] for result in failed] == [True]
    await gpumesh("down")
