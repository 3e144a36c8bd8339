"""A command that is a fork of a process with gpumesh in it (tests/real/warm_commands.py) is like the installed one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.cli.meshes import SimulatedMesh
from tests.real.command import Gpumesh


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
