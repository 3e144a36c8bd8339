"""What a mesh has learned about its servers, over a restart: with a real file, and simulated servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.learned_state import LearnedState
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import NodeSpec, Topology
from tests.mesh.meshes import MODEL, host, node


def topology(spec: NodeSpec) -> Topology:
    return Topology("test", (spec,))


async def chat(mesh: Mesh, count: int) -> None:
    await mesh.wait_usable(MODEL, timeout_s=10.0)
    for _ in range(count):
        async with mesh.chat(MODEL, "Why?") as stream:
            async for _chunk in stream:
                pass


async def test_rates_and_slots_survive_a_restart_of_the_mesh(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    async with SimOllama(host("a", tokens_per_s=500.0)) as server:
        spec = node("a", server.url, max_parallel=None)
        async with Mesh(topology(spec), learned=LearnedState(path)) as mesh:
            await chat(mesh, 3)
            learned_s = mesh.fleet["a"].rates.decode_s(MODEL, 100)
            proven = mesh.fleet["a"].learned_slots.limit(MODEL).proven
        assert path.stat().st_mode & 0o777 == 0o600
        async with Mesh(topology(spec), learned=LearnedState(path)) as mesh:
            await mesh.wait_usable(MODEL, timeout_s=10.0)
            await mesh.wait_first_report(10.0)
            assert mesh.fleet["a"].rates.is_measured(MODEL)
            assert abs(mesh.fleet["a"].rates.decode_s(MODEL, 100) - learned_s) < 1e-6
            assert mesh.fleet["a"].learned_slots.limit(MODEL).proven == proven


async def test_a_mesh_that_may_only_read_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    async with SimOllama(host("a")) as server:
        async with Mesh(topology(node("a", server.url)), learned=LearnedState(path, read_only=True)) as mesh:
            await chat(mesh, 2)
            assert mesh.fleet["a"].rates.is_measured(MODEL)
        assert not path.exists()


async def test_a_program_that_uses_the_library_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with SimOllama(host("a")) as server, Mesh(topology(node("a", server.url))) as mesh:
        await chat(mesh, 2)
    assert list(tmp_path.iterdir()) == []
