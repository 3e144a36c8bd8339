"""A real llama-server as a node of kind ``auto``: what its probe finds, how it is limited, and while it is busy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.backends.base import ChatRequest, HttpCall, Message
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.errors import BackendStatus
from gpumesh.mesh.requests import silence_watch
from gpumesh.state import BackendState
from gpumesh.topology import BackendKind
from tests.mesh.meshes import RunningMesh, mesh_of_nodes, node
from tests.prerequisites import needs
from tests.real.hosts import LlamaServer
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240), needs("llama-server")]

SLOTS, CONTEXT = 2, 1024


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.real import tiny_model  # numpy takes its time, and is for these tests only

    return tiny_model.write_tiny_model(tmp_path_factory.mktemp("model") / "slow.gguf", layers=16, dim=512)


@pytest.fixture
async def server(slow_model: Path) -> AsyncIterator[LlamaServer]:
    async with LlamaServer(slow_model, slots=SLOTS, context=CONTEXT) as running:
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


async def test_its_comments_while_it_reads_a_long_prompt_are_no_tokens(
    slow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head comes at once, and then a comment each 30 s, here each second: both are no sign of a token."""
    monkeypatch.setattr(silence_watch, "DEFAULT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 0.5)
    options = ("--sse-ping-interval", "1")
    kind = BackendKind.LLAMACPP
    async with (
        LlamaServer(slow_model, options=options) as one,
        LlamaServer(slow_model, options=options) as other,
        mesh_of_nodes(node("a", one.url, kind=kind), node("b", other.url, kind=kind)) as mesh,
    ):
        body = {
            "model": "tiny",
            "stream": True,
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "y" * 900}],
        }
        call = HttpCall("POST", "/v1/chat/completions", json.dumps(body).encode())
        asked_at = asyncio.get_running_loop().time()
        answer = await mesh.mesh.send(Demand("tiny"), dict.fromkeys(BackendKind, call), timeout_s=200.0)
        opened_after_ms = (asyncio.get_running_loop().time() - asked_at) * 1000.0
        await answer.read()
        assert (answer.attempts, answer.continuations) == (1, 0)
        assert answer.counters is not None
        assert answer.counters.prompt_ms is not None
        assert opened_after_ms > 0.9 * answer.counters.prompt_ms, "the answer begins with its first token"
