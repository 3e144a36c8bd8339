"""A command that is a fork of a process with gpumesh in it (tests/real/warm_commands.py) is like the installed one."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.meshes import SimulatedMesh
from tests.real.command import CAN_WARM, Gpumesh


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--version"], ["config", "check"], ["nonsense"], ["run", "--file", "-"]])
async def test_exit_code_and_output_are_the_same(gpumesh: Gpumesh, arguments: list[str]) -> None:
    warm, cold = [await replace(gpumesh, warm=warm)(*arguments, stdin="x", code=None) for warm in (True, False)]
    assert (warm.code, warm.out, warm.err) == (cold.code, cold.out, cold.err)
    assert warm.out + warm.err


@pytest.mark.slow
async def test_a_command_is_killed_when_its_caller_is_cancelled(direct: SimulatedMesh) -> None:
    async with asyncio.TaskGroup() as group:
        mesh = group.create_task(direct.gpumesh("up"))
        while (await direct.gpumesh("status", "--json", code=None)).json()["gateway"]["state"] != "serving":
            await asyncio.sleep(0.1)
        mesh.cancel()
    async with asyncio.timeout(30):
        while "no mesh is running" not in (await direct.gpumesh("down", code=None)).err:
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_WARM, reason="processes are forked on Linux only")
async def test_a_background_mesh_looks_like_a_started_one(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    await gpumesh("up", "-d")
    mesh = gpumesh.leader()
    assert command_line(mesh)[1:5] == ["-P", "-m", "gpumesh.daemon", str(gpumesh.config)]
    assert Path(f"/proc/{mesh}/cwd").readlink() == gpumesh.home
    assert os.getsid(mesh) == mesh
    titles = {" ".join(command_line(pid)).strip() for pid in gpumesh.processes() - {mesh}}
    assert titles == {"gpumesh tunnels", "gpumesh tunnel alpha", "gpumesh tunnel beta"}
    await gpumesh("down")
    assert gpumesh.processes() == set()


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
