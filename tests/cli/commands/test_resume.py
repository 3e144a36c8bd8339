from __future__ import annotations

import pytest

from tests.cli.meshes import SimulatedMesh

pytestmark = [pytest.mark.slow]


async def test_a_drained_node_works_again(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    await gpumesh("up", "-d")
    await gpumesh("drain", "alpha")
    ended = await gpumesh("resume", "alpha", "beta")
    assert (ended.out, ended.err) == ("", "")
    assert (await gpumesh("run", "x", "--node", "alpha", "--json", "-o", "num_predict=1")).json()["node"] == "alpha"
    assert "‖" not in (await gpumesh("status")).out
    await gpumesh("down")
