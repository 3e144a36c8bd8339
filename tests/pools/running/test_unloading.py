"""The Ollama of a pool's member is asked to unload its models."""

from __future__ import annotations

from gpumesh.pools.running.unloading import unload_models
from tests.mesh.meshes import MODEL, host, mesh_of_hosts


async def test_the_models_of_the_named_nodes_are_unloaded() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as running:
        fleet = running.mesh.fleet

        def loaded(node: str) -> list[str]:
            return [model.name for model in fleet[node].state(queued=0).backend.loaded]

        assert loaded("a") == loaded("b") == [MODEL]
        await unload_models(running.mesh, "big", ("b",))
        assert (loaded("a"), loaded("b")) == ([MODEL], [])
