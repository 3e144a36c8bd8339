"""Servers that know a model only under the name that they list: they get this spelling, whatever the client wrote."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gpumesh.topology import BackendKind, ModelSpec
from tests.gateway.fleet import RunningGateway, node, serve_nodes
from tests.mesh.servers import Exchange, serve, whole_response

SPELLINGS = ("Org/Model", "org/model", "ORG/MODEL:latest", "registry.ollama.ai/Org/Model", " Org/Model ")
MESSAGES = [{"role": "user", "content": "?"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "?"},
    "/v1/rerank": {"query": "?"},
}


class ExactServer:
    """Lists these models, and answers 404 to any other spelling of them. Keeps the names of its requests."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.names: list[str] = []

    async def __call__(self, exchange: Exchange) -> None:
        method, path, _ = exchange.head.split(b" ", 2)
        if path == b"/v1/models":
            entries = [{"id": name, "owned_by": "vllm"} for name in self.models]
            await exchange.send(whole_response(json.dumps({"object": "list", "data": entries}).encode()))
        elif method == b"GET":
            is_listed = path.decode().removeprefix("/v1/models/") in self.models
            await exchange.send(whole_response(b"{}", status="200 OK" if is_listed else "404 Not Found"))
        else:
            name = self.read_name(exchange)
            self.names.append(name)
            status = "200 OK" if name in self.models else "404 Not Found"
            await exchange.send(whole_response(b'{"choices":[{"message":{"content":"y"}}],"usage":{}}', status=status))

    @staticmethod
    def read_name(exchange: Exchange) -> str:
        if exchange.body.startswith(b"{"):
            return str(json.loads(exchange.body)["model"])
        return exchange.body.partition(b'name="model"\r\n\r\n')[2].partition(b"\r\n")[0].decode()


@asynccontextmanager
async def serve_exact(
    *servers: ExactServer, kind: BackendKind = BackendKind.VLLM, models: Sequence[ModelSpec] = ()
) -> AsyncIterator[RunningGateway]:
    async with AsyncExitStack() as stack:
        urls = [(await stack.enter_async_context(serve(server))).url for server in servers]
        nodes = tuple(node(name, url, kind=kind) for name, url in zip("abc", urls, strict=False))
        yield await stack.enter_async_context(serve_nodes(nodes, models=tuple(models)))


@pytest.mark.parametrize("models", [(), (ModelSpec("ORG/model"),), (ModelSpec("o", aliases=("org/model",)),)])
@pytest.mark.parametrize("kind", [BackendKind.VLLM, BackendKind.OPENAI])
async def test_a_server_gets_the_name_that_it_lists(kind: BackendKind, models: tuple[ModelSpec, ...]) -> None:
    server = ExactServer("Org/Model")
    async with serve_exact(server, kind=kind, models=models) as running:
        for spelling in SPELLINGS:
            for path, body in ROUTES.items():
                for named in ({"model": spelling, **body}, {**body, "model": spelling}):
                    answer = await running.client.post(path, json=named)
                    assert answer.status_code == 200, (path, spelling)
            form = await running.client.post(
                "/v1/audio/transcriptions",
                data={"model": spelling},
                files={"file": ("a.wav", b"\r\nRIFF", "audio/wav")},
            )
            assert form.status_code == 200, spelling
            listed = await running.client.get(f"/v1/models/{spelling.strip()}")
            assert listed.status_code == 200, spelling
        assert set(server.names) == {"Org/Model"}


async def test_each_server_gets_its_own_spelling() -> None:
    first, second = ExactServer("Org/Model"), ExactServer("org/model")
    async with serve_exact(first, second) as running:
        for name in ("a", "b") * 2:
            answer = await running.client.post(
                "/v1/chat/completions",
                json={"model": "Org/Model", "messages": MESSAGES},
                headers={"X-GPUMesh-Node": name},
            )
            assert answer.status_code == 200
        assert (set(first.names), set(second.names)) == ({"Org/Model"}, {"org/model"})


async def test_names_that_differ_only_in_case_stay_two_models() -> None:
    """Two adapters of one server, for example."""
    server = ExactServer("Adapter", "adapter")
    async with serve_exact(server) as running:
        for name in ("Adapter", "adapter", "ADAPTER"):
            await running.client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES})
        assert server.names == ["Adapter", "adapter", "Adapter"]
