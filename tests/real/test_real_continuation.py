"""A real inference server is killed in mid-answer and another one of the same model goes on: the text is the very one
that one server alone gives (at temperature 0, where it follows from the prompt)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.gateway.app import Gateway
from gpumesh.topology import BackendKind
from tests.mesh.meshes import mesh_of_nodes, node
from tests.prerequisites import needs
from tests.real.hosts import LlamaServer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240), needs("llama-server")]

TOKENS = 42
ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}],
    "temperature": 0,
    "max_tokens": TOKENS,
    "stream": True,
    "stream_options": {"include_usage": True},
}


async def read(http: aiohttp.ClientSession, url: str, *, kill: LlamaServer | None = None) -> tuple[str, dict[str, Any]]:
    """The text and the last frame; ``kill`` dies when a third of it has come."""
    said: list[str] = []
    last: dict[str, Any] = {}
    async with http.post(f"{url}/v1/chat/completions", json=ASKED) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if not data or data == b"[DONE]":
                continue
            last = json.loads(data)
            assert "error" not in last, last
            if last["choices"]:
                said.append(last["choices"][0]["delta"].get("content") or "")
            if kill is not None and len(said) > TOKENS // 3:
                assert kill.process is not None
                kill.process.kill()
                kill = None
    return "".join(said), last


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.real import tiny_model  # numpy takes its time, and is for these tests only

    with pytest.MonkeyPatch.context() as patch:
        # Its tokenizer reads a blank as other tokens than the model writes: answers without any can be read back.
        patch.setattr(tiny_model, "ANSWERED", tiny_model.ANSWERED.replace(b" ", b""))
        # Slow enough that the whole answer is not in the sockets' buffers when its server dies.
        return tiny_model.write_tiny_model(tmp_path_factory.mktemp("model") / "slow.gguf", layers=16, dim=512)


@pytest.mark.parametrize("kind", [BackendKind.AUTO, BackendKind.LLAMACPP, BackendKind.OPENAI])
async def test_another_llama_server_goes_on(slow_model: Path, kind: BackendKind) -> None:
    async with LlamaServer(slow_model) as one, LlamaServer(slow_model) as other:
        specs = (
            node("one", one.url, weight=100.0, kind=kind, max_parallel=2),
            node("other", other.url, kind=kind, max_parallel=2),
        )
        async with (
            mesh_of_nodes(*specs) as mesh,
            Gateway(mesh.mesh, port=0) as gateway,
            aiohttp.ClientSession() as http,
        ):
            want, figures = await read(http, other.url)
            assert len(want) == TOKENS
            got, last = await read(http, gateway.url, kill=one)
            assert got == want
            assert last["usage"]["completion_tokens"] == figures["usage"]["completion_tokens"]
            assert last["gpumesh"]["continued"] == 1
            assert last["gpumesh"]["tokens_before"] >= TOKENS // 3
            assert mesh.mesh.request_counters.served == 1
            messages = tuple(Message(str(one["role"]), str(one["content"])) for one in ASKED["messages"])
            request = ChatRequest("tiny", messages, {"temperature": 0, "num_predict": TOKENS})
            assert "".join([chunk.text async for chunk in mesh.mesh.chat(request)]) == want
