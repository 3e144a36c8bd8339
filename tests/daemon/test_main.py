"""The background mesh's process, as `detach.spawn` starts it: what it tells through the pipe, and its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from gpumesh.daemon.control_socket import messages
from gpumesh.errors import UsageError
from tests.cli.meshes import SimulatedMesh, isolated_command, quick_host, simulated_mesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]


class Background:
    """A background process; ``read_report`` gives the one message on its pipe."""

    def __init__(self, process: asyncio.subprocess.Process, reader: int) -> None:
        self.process = process
        self._reader = reader

    async def read_report(self) -> messages.ControlReply:
        async with asyncio.timeout(30):
            data = await asyncio.to_thread(self._read)
        return messages.decode_reply(data)

    def _read(self) -> bytes:
        with os.fdopen(self._reader, "rb") as pipe:
            return pipe.readline()


async def start_background(gpumesh: Gpumesh, *arguments: str) -> Background:
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "gpumesh.daemon", str(gpumesh.config), "--ready-fd", str(writer), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=gpumesh.environment(),
        pass_fds=(writer,),
    )
    os.close(writer)
    return Background(process, reader)


async def test_it_reports_when_it_serves_and_ends_cleanly(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False)) as made:
            background = await start_background(gpumesh)
            assert await background.read_report() == messages.End()
            assert (await gpumesh("run", "x", "-o", "num_predict=1")).out.strip()
            background.process.send_signal(signal.SIGHUP)
            assert (await gpumesh("status", "--json")).json()["gateway"]["state"] == "serving", "its terminal may close"
            background.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await background.process.wait() == 0
            assert gpumesh.sockets() == []
            assert isinstance(made, SimulatedMesh)


@pytest.mark.parametrize(
    ("text", "arguments", "code", "reason"),
    [
        ("nodes: []", [], 2, "names no node"),
        (None, ["--node=gamma"], 2, "no node 'gamma'"),
        (None, ["--listen=nonsense"], 2, "is not HOST:PORT"),
    ],
)
async def test_it_reports_why_it_cannot_start(
    tmp_path: Path, text: str | None, arguments: list[str], code: int, reason: str
) -> None:
    with isolated_command(tmp_path) as gpumesh:
        good = {
            "gateway": {"listen": "127.0.0.1:0"},
            "nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}}],
        }
        gpumesh.config.write_text(text or json.dumps(good))
        background = await start_background(gpumesh, *arguments)
        report = await background.read_report()
        assert isinstance(report, messages.Error)
        assert reason in report.message
        assert messages.error_from_message(report).exit_code == UsageError.exit_code
        async with asyncio.timeout(20):
            assert await background.process.wait() == code
        assert background.process.stderr is not None
        assert await background.process.stderr.read() == b""


async def test_it_serves_without_its_parent(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False)):
            background = await start_background(gpumesh)
            os.close(background._reader)
            async with asyncio.timeout(30):
                while (await gpumesh("status", "--json", code=None)).json()["gateway"]["state"] != "serving":
                    await asyncio.sleep(0.05)
            await gpumesh("down")
            async with asyncio.timeout(20):
                await background.process.wait()


async def test_an_error_of_the_system_is_reported(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False)):
            await gpumesh("up", "-d")
            (log,) = gpumesh.home.rglob("*.jsonl")
            await gpumesh("down")
            log.unlink()
            log.mkdir()
            ended = await gpumesh("up", "-d", code=1)
            assert ended.err.startswith(f"error: the mesh could not start: {log}: Is a directory")
