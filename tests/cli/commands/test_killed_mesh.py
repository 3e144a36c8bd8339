"""`kill -9` of the mesh: each command that would show the mesh, or that was asking it, says what has happened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from tests.cli.meshes import MODEL, isolated_command, quick_host, simulated_mesh

KILLED = re.compile(
    r"the mesh that ran for this file ended without stopping \(killed or crashed\) at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, "
    rf"with 1 request in flight \(1 of {re.escape(MODEL)} on alpha\)"
)


async def read_until(stream: asyncio.StreamReader | None, text: str) -> str:
    assert stream is not None
    read = ""
    async with asyncio.timeout(20):
        while text not in read:
            line = await stream.readline()
            assert line, f"ended with: {read}"
            read += line.decode()
    return read


@pytest.mark.slow
async def test_a_killed_mesh_is_told(tmp_path: Path) -> None:
    slow_host = quick_host("alpha", ssh=False, tokens_per_s=2.0, answer_tokens=(400, 400))
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, slow_host), contextlib.AsyncExitStack() as stack:
            await gpumesh("up", "-d")
            (lock,) = gpumesh.runtime.rglob("lock")
            (record,) = gpumesh.home.rglob("*.running")
            prompt = await stack.enter_async_context(gpumesh.started("run", "Hello"))
            assert prompt.stdout is not None
            await prompt.stdout.readexactly(1)
            watching = await stack.enter_async_context(gpumesh.started("status", "-w", "--json"))
            following = await stack.enter_async_context(gpumesh.started("logs", "-f"))
            await read_until(watching.stdout, "gpumesh.status/1")
            await read_until(following.stdout, "the gateway serves")
            async with asyncio.timeout(20):
                while MODEL not in record.read_text():
                    await asyncio.sleep(0.05)

            os.kill(int(lock.read_text()), signal.SIGKILL)
            for command in (prompt, watching):
                _, err = await command.communicate()
                assert KILLED.search(err.decode()), err.decode()
                assert command.returncode == 1
            assert KILLED.search(await read_until(following.stderr, "killed"))

            shown = await gpumesh("status", "--json", "--check", code=3)
            (finding,) = [each for each in shown.json()["findings"] if each["code"] == "mesh-killed"]
            assert KILLED.fullmatch(finding["message"])
            assert "mesh-killed" not in shown.err
            watched = await stack.enter_async_context(gpumesh.started("status", "-w", "--json"))
            assert KILLED.search(await read_until(watched.stderr, "killed"))
            assert KILLED.search((await gpumesh("logs")).err), "told until a mesh runs again"
            assert KILLED.search((await gpumesh("drain", "alpha", code=1)).err)

            await gpumesh("up", "-d")
            log = await gpumesh("logs")
            assert log.err == ""
            assert re.search(rf"error .* the mesh before this one \(pid \d+\) .*1 of {MODEL} on alpha", log.out)
            assert not any(
                each["code"] == "mesh-killed" for each in (await gpumesh("status", "--json")).json()["findings"]
            )

            os.kill(int(lock.read_text()), signal.SIGKILL)
            ended = await gpumesh("down", code=None)
            assert "ended without stopping (killed or crashed)" in ended.err
            assert "what it left behind is removed" in ended.err
            assert not record.exists()
            assert (await gpumesh("logs")).err == ""
