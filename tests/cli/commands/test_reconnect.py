from __future__ import annotations

import asyncio

import pytest

from gpumesh.lab.profile import Faults
from tests.cli.meshes import SimulatedMesh, quick_host, simulated_mesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]


async def test_a_tunnel_that_a_person_has_mended_is_tried_at_once(gpumesh: Gpumesh) -> None:
    """A refused key is tried again slowly, by itself; not when somebody asks for it."""
    async with simulated_mesh(gpumesh, quick_host("alpha")) as made:
        await made.hosts["alpha"].set_faults(Faults(ssh_refuse_key=True))
        await gpumesh("up", "-d", code=4)
        status = await gpumesh("status")
        assert "✗ alpha" in status.out
        await made.hosts["alpha"].set_faults(Faults())
        ended = await gpumesh("reconnect", "alpha")
        assert (ended.out, ended.err) == ("", "")
        async with asyncio.timeout(10):
            while "● alpha" not in (await gpumesh("status")).out:
                await asyncio.sleep(0.05)
        await gpumesh("down")


async def test_a_tunnel_that_is_up_stays_up(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    await gpumesh("up", "-d")
    before = (await gpumesh("status", "--json")).json()["nodes"][0]["tunnel"]
    await gpumesh("reconnect", "alpha", "beta")
    after = (await gpumesh("status", "--json")).json()["nodes"][0]["tunnel"]
    assert (after["state"], after["since"], after["reconnects"]) == ("up", before["since"], 0)
    await gpumesh("down")
