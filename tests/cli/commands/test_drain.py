from __future__ import annotations

import asyncio

import pytest

from tests.cli.meshes import SimulatedMesh, quick_host, simulated_mesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]


async def test_no_new_work_and_what_runs_there_ends(gpumesh: Gpumesh) -> None:
    slow = quick_host("busy", ssh=False, tokens_per_s=10.0, answer_tokens=(12, 12))
    async with simulated_mesh(gpumesh, slow, quick_host("idle", ssh=False)) as made:
        await gpumesh("up", "-d")
        async with gpumesh.started("run", "x", "--node", "busy", "--json") as asking:
            async with asyncio.timeout(20):
                while not made.hosts["busy"].counters.in_flight:
                    await asyncio.sleep(0.02)
            ended = await gpumesh("drain", "busy")
            assert (ended.out, ended.err) == ("", "")
            results = (await gpumesh("run", "-f", "-", stdin="a\nb\nc\nd\n")).lines()
            assert {result["node"] for result in results} == {"idle"}
            async with asyncio.timeout(20):
                assert await asking.wait() == 0
        ended = await gpumesh("run", "x", "--node", "busy", code=4)
        assert "no new work" in ended.err
        await gpumesh("down")


async def test_both_at_once_and_nobody_is_left(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    await gpumesh("up", "-d")
    await gpumesh("drain", "alpha", "beta")
    assert (await gpumesh("run", "x", code=4)).err
    await gpumesh("status", "--check", "-q", code=4)
    await gpumesh("down")


async def test_it_needs_a_running_mesh_and_a_node_that_is_there(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    for command in ("drain", "resume", "reconnect"):
        ended = await gpumesh(command, "alpha", code=1)
        assert "no mesh is running for this configuration" in ended.err
        assert "`gpumesh up -d` starts it" in ended.err
    await gpumesh("up", "-d")
    for command in ("drain", "resume", "reconnect"):
        ended = await gpumesh(command, "gamma", code=2)
        assert ended.err == "error: there is no node 'gamma'\nhint: the nodes are: alpha, beta\n"
        assert "Missing argument 'NODE'" in (await gpumesh(command, code=2)).err
    await gpumesh("down")
