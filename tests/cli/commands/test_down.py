"""What `down` says while it waits and when there is nothing to stop. (How it drains and cuts: test_up.)"""

from __future__ import annotations

import os
import signal

import pytest

from tests.cli.meshes import SimulatedMesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]


async def test_nothing_runs(direct: SimulatedMesh) -> None:
    ended = await direct.gpumesh("down")
    assert (ended.out, ended.err) == ("", "no mesh is running for this configuration\n")


async def test_without_a_mesh_yaml_there_is_none_to_stop(gpumesh: Gpumesh) -> None:
    ended = await gpumesh("down", code=2)
    assert "does not exist" in ended.err


async def test_one_that_does_not_answer_is_killed_and_that_is_said(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    await gpumesh("up", "-d")
    (pid,) = gpumesh.processes()
    os.kill(pid, signal.SIGSTOP)
    ended = await gpumesh("down", "--wait", "0", code=1)
    assert "was killed" in ended.err
    assert "`gpumesh logs` may say why" in ended.err
    assert gpumesh.processes() == set()
    assert gpumesh.sockets() == []


async def test_a_mesh_yaml_that_is_broken_by_now_does_not_keep_a_mesh_alive(direct: SimulatedMesh) -> None:
    await direct.gpumesh("up", "-d")
    direct.gpumesh.config.write_text("nodes: [")
    ended = await direct.gpumesh("down")
    assert ended.err == "stopped\n"
