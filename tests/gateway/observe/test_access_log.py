from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.gateway.observe import access_log
from gpumesh.gateway.observe.access_log import AccessLog, build_entry
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.topology import BackendKind, GatewaySpec, PolicyKind
from tests.gateway.fleet import MODEL, lines, quick_host, serve_hosts
from tests.tunnels.polling import wait_until

AT = datetime(2026, 11, 24, 4, 10, tzinfo=UTC).timestamp()


def record(**changes: Any) -> RequestRecord:
    request_record = RequestRecord(lambda: 0.0, 10.0, "POST", "/api/chat", "/api/chat")
    request_record.ended_at, request_record.status, request_record.outcome, request_record.sent_bytes = (
        12.5,
        200,
        RequestOutcome.SERVED,
        321,
    )
    for name, value in changes.items():
        setattr(request_record, name, value)
    return request_record


def written(path: Path) -> list[Any]:
    return lines(path.read_text()) if path.exists() else []


def test_the_line_of_a_request() -> None:
    answer = Answer("iceland", BackendKind.OLLAMA, 200, ())
    answer.attempts, answer.queue_ms, answer.continuations = 2, 12.34, 1
    request_record = record(answer=answer, node="iceland", first_byte_at=10.25, demand=Demand("qwen2.5:7b"))
    assert asdict(build_entry(request_record, AT, client="10.0.0.7", request_id="r-1")) == {
        "at": "2026-11-24T04:10:00.000Z",
        "client": "10.0.0.7",
        "method": "POST",
        "path": "/api/chat",
        "status": 200,
        "outcome": "served",
        "model": "qwen2.5:7b",
        "node": "iceland",
        "attempts": 2,
        "continuations": 1,
        "queue_ms": 12.3,
        "ttft_ms": 250.0,
        "total_ms": 2500.0,
        "bytes": 321,
        "id": "r-1",
    }


def test_unknown_values_are_null() -> None:
    whole = record(answer=WholeAnswer("a", BackendKind.OLLAMA, 200, (), b"{}"), first_byte_at=11.0)
    assert build_entry(whole, AT, client=None, request_id=None).ttft_ms is None, "there was no first token to be seen"
    refused = build_entry(record(status=0, path="/x" * 5000), AT, client=None, request_id=None)
    assert (refused.status, refused.model, refused.node, refused.queue_ms) == (None, None, None, None)
    assert len(refused.path) == access_log.MAX_TEXT_CHARS


async def test_the_lines_that_a_gateway_writes(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "access.jsonl"
    log = AccessLog(path)
    async with serve_hosts(spec=GatewaySpec(policy=PolicyKind.ROUND_ROBIN), access_log=log) as fleet:
        await fleet.hosts["a"].set_faults(Faults(disconnect=True, paths=("/api/generate",)))
        await fleet.chat("a secret prompt", headers={"X-Request-Id": "r-1"})
        body = {"model": MODEL, "prompt": "a secret prompt"}
        for _ in range(2):
            await fleet.client.post("/api/generate?key=secret", json=body)
        await fleet.chat(model="nobody:1b")
        await fleet.client.get("/nowhere")
    chat, *generated, missing, nowhere = written(path)
    assert (chat["path"], chat["status"], chat["outcome"], chat["id"]) == ("/api/chat", 200, "served", "r-1")
    assert chat["client"] == "127.0.0.1"
    assert chat["bytes"] > 100
    assert 0 <= chat["queue_ms"] <= chat["total_ms"]
    assert {line["node"] for line in generated} == {"b"}
    assert sorted(line["attempts"] for line in generated) == [1, 2]
    assert all(0 < line["ttft_ms"] <= line["total_ms"] for line in generated)
    assert (missing["model"], missing["status"], missing["node"]) == ("nobody:1b", 404, None)
    assert (nowhere["method"], nowhere["outcome"]) == ("GET", "refused")
    assert "secret" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_client_that_left(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    async with serve_hosts(quick_host("a", tokens_per_s=5.0), access_log=AccessLog(path)) as fleet:
        leaving = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "it runs")
        leaving.cancel()
        await wait_until(lambda: bool(written(path)), "the line is there")
    (line,) = written(path)
    assert (line["status"], line["outcome"], line["model"]) == (499, "cancelled", MODEL)


async def test_lines_are_written_soon_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "access.jsonl"
    writes: list[int] = []
    write = os.write

    def counted(file: int, data: bytes) -> int:
        writes.append(file)
        return write(file, data)

    monkeypatch.setattr(os, "write", counted)
    log = AccessLog(path)
    for _ in range(access_log.FLUSH_LINES - 1):
        log.add(record(), client=None, request_id=None)
    assert writes == []
    await wait_until(lambda: len(written(path)) == access_log.FLUSH_LINES - 1, "they are there by themselves")
    assert len(writes) == 1
    for _ in range(access_log.FLUSH_LINES):
        log.add(record(), client=None, request_id=None)
    assert len(writes) == 2, "many do not wait"
    log.close()


async def test_rotation_keeps_the_configured_number_of_files(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, rotate_bytes=1000, rotated_files=2)
    for number in range(40):
        log.add(record(path=f"/{number}"), client=None, request_id=None)
        log.flush()
    log.close()
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["access.jsonl", "access.jsonl.1", "access.jsonl.2"]
    assert all((tmp_path / name).stat().st_size <= 1000 for name in files)
    kept = [line["path"] for name in reversed(files) for line in written(tmp_path / name)]
    assert kept == [f"/{number}" for number in range(40 - len(kept), 40)], "the newest, without a gap"
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files} == {0o600}
    again = AccessLog(path, rotate_bytes=1000, rotated_files=2)
    again.add(record(path="/again"), client=None, request_id=None)
    again.close()
    assert any(line["path"] == "/again" for line in written(path)), "a restart goes on where it was"


async def test_a_full_disk_costs_lines_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "access.jsonl"

    def full(_file: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = AccessLog(path)
    async with serve_hosts(access_log=log) as fleet:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            for _ in range(3):
                assert (await fleet.chat()).status_code == 200
                log.flush()
        warnings = [
            entry for entry in caplog.records if entry.levelno == logging.WARNING and "access log" in entry.message
        ]
        assert len(warnings) == 1, "logged once"
        await fleet.chat()
    assert len(written(path)) == 1, "it goes on when there is room again"


async def test_hostile_names_stay_within_their_line(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(path)
    log.add(record(demand=Demand('x\n{"at": "forged"}\x1b[31m')), client=None, request_id=None)
    log.close()
    text = path.read_text()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert json.loads(text)["model"].startswith("x\n")


async def test_repr_tells_the_state(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(path)
    assert repr(log) == f"<AccessLog {path} not open 0 pending>"
    log.add(record(), client=None, request_id=None)
    assert repr(log) == f"<AccessLog {path} not open 1 pending>"
    log.flush()
    assert repr(log) == f"<AccessLog {path} open 0 pending>"
    log.close()
