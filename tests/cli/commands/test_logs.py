from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gpumesh.cli.views.logs.lines import format_log_line
from gpumesh.daemon.paths import MeshPaths, for_config
from gpumesh.lab.profile import Faults
from tests.cli.in_process import invoke
from tests.cli.meshes import SimulatedMesh
from tests.real.command import GPUMESH, Gpumesh

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")


def line(**changes: object) -> str:
    said = {"at": "2026-11-24T04:10:00.123Z", "level": "info", "event": "x", "node": "iceland", "message": "tunnel up"}
    return json.dumps({**said, **changes})


def test_a_line_for_people() -> None:
    shown = format_log_line(line())
    assert shown.split("  ", 1)[1] == "info     iceland       tunnel up"
    assert shown[4] == shown[7] == "-"
    assert format_log_line(line(node=None, level="warning")).split("  ", 1)[1] == "warning  -             tunnel up"


def test_a_line_of_the_access_log() -> None:
    entry = {"at": "2026-11-24T04:10:00.123Z", "client": "127.0.0.1", "method": "POST", "path": "/api/chat\x1b[2J",
             "status": 200, "outcome": "served", "total_ms": 1840.2, "ttft_ms": 212.0, "queue_ms": 0, "attempts": 2,
             "model": "qwen2.5:7b", "node": "iceland", "id": "r1"}  # fmt: skip
    shown = format_log_line(json.dumps(entry))
    assert shown.split(" ", 2)[2] == (
        "127.0.0.1 POST /api/chat 200 served 1840 ms ttft 212 ms attempts 2 qwen2.5:7b iceland r1"
    )
    assert len(shown.split(" ", 2)[1]) == len("04:10:00")


def test_a_trace_stands_below() -> None:
    assert format_log_line(line(trace="Traceback:\n  x\x1b[31m\n")).splitlines()[1:] == ["Traceback:", "  x[31m"]


@pytest.mark.parametrize(
    "odd", ["", "not json \x1b[2J", "[]", "5", "{}", '{"at": 5, "level": 1, "message": 2}', "[" * 100_000]
)
def test_what_is_no_line_of_ours_is_shown_safely(odd: str) -> None:
    assert "\x1b" not in format_log_line(odd)


def test_hostile_words() -> None:
    shown = format_log_line(line(message="a\nb\x1b]0;x\x07c", node="\x1b[31mn"))
    assert "\n" not in shown
    assert "\x1b" not in shown


@slow
async def test_the_log_of_a_mesh_while_it_runs_and_after(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    ended = await gpumesh("logs", code=1)
    assert "there is no log yet" in ended.err
    assert "`gpumesh up -d` starts a mesh" in (await gpumesh("logs", "--access", code=1)).err
    await gpumesh("up", "-d")
    assert "for each request that comes to the gateway" in (await gpumesh("logs", "--access", code=1)).err
    async with gpumesh.started("logs", "-f", "-n", "1000") as process:
        assert process.stdout is not None
        seen = b""

        async def until(text: bytes) -> None:
            nonlocal seen
            async with asyncio.timeout(30):
                while text not in seen:
                    assert process.stdout is not None
                    seen += await process.stdout.readline()

        await until(b"the gateway serves at")
        await direct.hosts["beta"].set_faults(Faults(refuse=True))
        await until(b"-> down")
        await gpumesh("down")
        await until(b"the mesh tested ended")
        await gpumesh("up", "-d")
        await until(b"the mesh tested starts")
        process.terminate()
    await gpumesh("down")
    text = seen.decode()
    (down,) = [line for line in text.splitlines() if "healthy -> down" in line or "degraded -> down" in line]
    assert "warning  beta" in down
    assert sum("nothing listens" in line for line in text.splitlines()) == 1, "the fault is there once"
    whole = (await gpumesh("logs", "--json", "-n", "5")).lines()
    assert len(whole) == 5
    assert all({"at", "level", "event", "node", "message"} <= line.keys() for line in whole)
    assert (await gpumesh("logs", "-n", "0")).out == ""


@slow
async def test_it_is_followed_through_its_rotation(gpumesh: Gpumesh, tmp_path: Path) -> None:
    gpumesh.config.write_text(json.dumps({"nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}}]}))
    log = await log_of(gpumesh)
    log.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    log.write_text(line(message="first") + "\n")
    async with gpumesh.started("logs", "-f") as process:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert b"first" in await process.stdout.readline()
            with log.open("a") as file:
                file.write(line(message="in two")[:40])
                file.flush()
                file.write(line(message="in two")[40:] + "\n")
            assert b"in two" in await process.stdout.readline()
            os.rename(log, log.with_name("log.1"))
            log.write_text(line(message="after the rotation") + "\n")
            assert b"after the rotation" in await process.stdout.readline()
        process.terminate()


async def log_of(gpumesh: Gpumesh) -> Path:
    """Where the command looks for it."""
    ended = await gpumesh("logs", code=1)
    return Path(ended.err.split("there is no log yet at ")[1].splitlines()[0])


@slow
async def test_a_silent_log_ends_when_nobody_reads_it_any_more(gpumesh: Gpumesh) -> None:
    """As `logs -f | head -1` would wait for ever for a line to write."""
    gpumesh.config.write_text(json.dumps({"nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}}]}))
    log = await log_of(gpumesh)
    log.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    log.write_text(line(message="only") + "\n")
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        str(GPUMESH), "logs", "-f", stdout=writer, stderr=asyncio.subprocess.PIPE, env=gpumesh.environment()
    )
    os.close(writer)
    assert b"only" in await asyncio.to_thread(os.read, reader, 4096)
    os.close(reader)
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (1, b"")


@pytest.fixture
def written_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log with an older file, and the mesh.yaml that it belongs to."""
    config = tmp_path / "mesh.yaml"
    config.write_text(json.dumps({"nodes": [{"name": "iceland", "backend": {"url": "http://127.0.0.1:1"}}]}))
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    for name, value in (("HOME", tmp_path), ("XDG_RUNTIME_DIR", runtime), ("GPUMESH_CONFIG", config)):
        monkeypatch.setenv(name, str(value))
    log = for_config(config).log
    log.parent.mkdir(parents=True)
    log.with_name(f"{log.name}.1").write_text(line(message="oldest") + "\n")
    now = datetime.now(UTC)
    entries = [
        line(message="an hour ago", at=(now - timedelta(hours=1)).isoformat(), level="warning"),
        line(message="of the gone", node="gone", at=now.isoformat()),
        line(message="of none", node=None, at=now.isoformat(), level="error"),
    ]
    log.write_text("\n".join(entries) + "\n")
    return log


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ((), ["oldest", "an hour ago", "of the gone", "of none"]),
        (("iceland",), ["oldest", "an hour ago"]),
        (("iceland", "gone"), ["oldest", "an hour ago", "of the gone"]),
        (("--since", "2h"), ["an hour ago", "of the gone", "of none"]),
        (("--since", "10m", "--tail", "1"), ["of none"]),
        (("--level", "warning"), ["an hour ago", "of none"]),
        (("--level=error", "--since=2h"), ["of none"]),
        (("-n", "2"), ["of the gone", "of none"]),
        (("--tail=4",), ["oldest", "an hour ago", "of the gone", "of none"]),
    ],
)
def test_only_some_lines(written_log: Path, words: tuple[str, ...], messages: list[str]) -> None:
    shown = invoke("logs", "--json", *words).out
    assert [json.loads(entry)["message"] for entry in shown.splitlines()] == messages


def test_what_is_refused(written_log: Path) -> None:
    assert "did you mean iceland?" in invoke("logs", "icland", code=2).err
    assert "neither a duration nor a time" in invoke("logs", "--since", "soon", code=2).err
    assert "'error'" in invoke("logs", "--level", "loud", code=2).err
    assert "requests have no level" in invoke("logs", "--access", "--level", "error", code=2).err


def test_where_it_is(tmp_path: Path) -> None:
    paths = MeshPaths(tmp_path / "mesh.yaml", tmp_path / "run", tmp_path / "logs" / "x.jsonl")
    assert paths.stderr_log == tmp_path / "logs" / "x.stderr"
