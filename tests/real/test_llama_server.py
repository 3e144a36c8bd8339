"""A real llama-server as a node of kind ``auto``: what its probe finds, how it is limited, and while it is busy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.balancer.base import ResidencyKey
from gpumesh.errors import BackendStatus
from gpumesh.state import BackendState
from gpumesh.topology import BackendKind
from tests.mesh.meshes import RunningMesh, mesh_of_nodes, node
from tests.prerequisites import needs
from tests.real.hosts import LlamaServer
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow, needs("llama-server")]

SLOTS, CONTEXT = 2, 1024


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LlamaServer]:
    from tests.real import tiny_model  # numpy takes its time, and is for these tests only

    model = tiny_model.write_tiny_model(tmp_path / "slow.gguf", layers=16, dim=512)
    async with LlamaServer(model, slots=SLOTS, context=CONTEXT) as running:
        yield running


def state_of(mesh: RunningMesh) -> BackendState:
    return mesh.mesh.snapshot().nodes[0].backend


async def test_what_it_says_of_itself(server: LlamaServer) -> None:
    async with mesh_of_nodes(node("a", server.url, kind=BackendKind.AUTO, max_parallel=None)) as mesh:
        state = state_of(mesh)
        assert (state.kind, state.models) == ("llamacpp", ("tiny",))
        assert (state.running, state.waiting) == (0, 0)
        (loaded,) = state.loaded
        assert loaded.context_length == CONTEXT, "of one slot, not of all"
        (node_of_mesh,) = mesh.mesh.fleet
        account = node_of_mesh.account
        assert account.slots("tiny:latest", 0.0) == SLOTS
        assert account.residency.is_resident(ResidencyKey("tiny:latest"))


async def test_its_slots_are_the_limit(server: LlamaServer) -> None:
    async with mesh_of_nodes(node("a", server.url, kind=BackendKind.AUTO, max_parallel=None)) as mesh:
        request = ChatRequest("tiny", (Message("user", "Hi"),), {"num_predict": 400})
        streams = [mesh.mesh.chat(request) for _ in range(SLOTS + 2)]
        tasks = [asyncio.create_task(stream.__anext__()) for stream in streams]
        await wait_until(lambda: state_of(mesh).running == SLOTS, "its probe shows what runs")
        snapshot = mesh.mesh.snapshot()
        assert snapshot.nodes[0].load.in_flight == SLOTS
        assert snapshot.gateway.queued == 2
        assert state_of(mesh).waiting == 0, "the queue is the mesh's"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(stream.aclose() for stream in streams), return_exceptions=True)


async def test_a_prompt_that_is_too_long_is_told_in_its_words(server: LlamaServer) -> None:
    async with mesh_of_nodes(node("a", server.url, kind=BackendKind.AUTO)) as mesh:
        with pytest.raises(BackendStatus, match="exceeds the available context size") as refused:
            await mesh.mesh.chat(ChatRequest("tiny", (Message("user", "y" * 9000),))).__anext__()
        assert refused.value.status == 400
