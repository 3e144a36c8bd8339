"""Nodes with servers of several kinds in one mesh: each is found by asking, used as what it is, continued by others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.prefill import ContinuationStrategy
from gpumesh.balancer.base import Demand
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.lab.vllm import SimVllm
from gpumesh.state import BackendPhase
from gpumesh.topology import BackendKind
from tests.mesh.meshes import MODEL, host, mesh_of_nodes, node, text_of
from tests.tunnels.polling import wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Wie groß ist es?"}], "stream": True}
AUTO = BackendKind.AUTO


def call(**changes: Any) -> dict[BackendKind, HttpCall]:
    path = "/v1/chat/completions"
    return dict.fromkeys(BackendKind, HttpCall("POST", path, json.dumps({**CHAT, **changes}).encode()))


async def test_each_node_is_used_as_what_it_is() -> None:
    async with SimOllama(host("a")) as ollama, SimVllm(host("b", slots=3)) as vllm:
        specs = (
            node("a", ollama.url, kind=AUTO, max_parallel=None),
            node("b", vllm.url, kind=AUTO, max_parallel=None),
        )
        async with mesh_of_nodes(*specs) as mesh:
            first, second = mesh.mesh.snapshot().nodes
            assert (first.backend.kind, second.backend.kind) == ("ollama", "vllm")
            assert (first.backend.running, second.backend.running) == (None, 0)
            assert (second.backend.waiting, second.backend.kv_cache_pct) == (0, 0)
            assert [model.context_length for model in second.backend.loaded] == [32768]
            slots = {entry.name: entry.account.slots(MODEL, 0.0) for entry in mesh.mesh.fleet}
            assert slots == {"a": 2, "b": None}
            for name in ("a", "b"):
                assert await mesh.mesh.chat(MODEL, "Hi", node=name).__anext__()


@pytest.mark.parametrize("kind", [AUTO, BackendKind.OPENAI])
async def test_an_answer_that_one_vllm_began_another_continues(kind: BackendKind) -> None:
    """As kind ``openai``, it is first asked as an Ollama, and answers 404: that is no failure."""
    async with SimVllm(host("a")) as one, SimVllm(host("b")) as other:
        specs = (node("a", one.url, weight=100.0, kind=kind), node("b", other.url, kind=kind))
        async with mesh_of_nodes(*specs) as mesh:
            whole = await mesh.mesh.send(Demand(MODEL), call(), timeout_s=20.0)
            want = text_of(await whole.read())
            await one.set_faults(Faults(cut_after_tokens=11))
            answer = await mesh.mesh.send(Demand(MODEL), call(), timeout_s=20.0)
            assert text_of(await answer.read()) == want
            assert answer.attempts == 2
            assert mesh.mesh.request_counters.served == 2
            assert mesh.mesh._send_context.strategies == {("b", MODEL): ContinuationStrategy.ASSISTANT_LAST}


async def test_a_server_of_the_same_api_continues_what_another_kind_began() -> None:
    """Kind ``openai`` is the stand-in for Ollama over its /v1: it shows its prompt as an Ollama does."""
    async with SimVllm(host("a")) as vllm, SimOllama(host("b")) as other:
        specs = (node("a", vllm.url, weight=100.0, kind=AUTO), node("b", other.url, kind=BackendKind.OPENAI))
        async with mesh_of_nodes(*specs) as mesh:
            await vllm.set_faults(Faults(cut_after_tokens=11))
            answer = await mesh.mesh.send(Demand(MODEL), call(), timeout_s=20.0)
            text_of(await answer.read())
            assert answer.attempts == 2
            assert mesh.mesh.request_counters.served == 1


async def test_a_node_whose_server_is_not_known_yet_is_not_used() -> None:
    async with SimVllm(host("a")) as vllm:
        await vllm.set_faults(Faults(refuse=True))
        async with mesh_of_nodes(node("a", vllm.url, kind=AUTO)) as mesh:
            (state,) = mesh.mesh.snapshot().nodes
            assert state.backend.kind == "auto"
            assert state.backend.state is not BackendPhase.UP
            assert mesh.mesh.usable_nodes() == ()
            await vllm.set_faults(Faults())
            await wait_until(lambda: mesh.mesh.usable_nodes() == ("a",), "it is known")
            assert mesh.mesh.snapshot().nodes[0].backend.kind == "vllm"


async def test_a_server_that_takes_the_port_of_another_kind_is_used_as_its_own() -> None:
    async with SimOllama(host("a")) as first:
        port = first.port
        async with mesh_of_nodes(node("a", first.url, kind=AUTO)) as mesh:
            assert mesh.mesh.snapshot().nodes[0].backend.kind == "ollama"
            await first.set_faults(Faults(refuse=True))
            async with SimVllm(host("a"), port=port):
                await wait_until(lambda: mesh.mesh.snapshot().nodes[0].backend.kind == "vllm", "it is noticed")
                chunks = [chunk.text async for chunk in mesh.mesh.chat(MODEL, "Hi")]
                assert len([text for text in chunks if text]) == 40
