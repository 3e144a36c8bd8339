"""Forms, and routes that servers have and the gateway does not know: they go to a node that has the model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gpumesh.topology import BackendKind, GatewaySpec
from tests.gateway.fleet import RunningGateway, node, send_raw, serve_nodes
from tests.mesh.servers import Exchange, ScriptedServer, serve, whole_response

WAV = bytes(range(256)) * 4 + b"\r\n--no boundary\r\n"
ROUTES = ("/v1/rerank", "/v1/audio/transcriptions", "/tokenize", "/v1/images/edits", "/v1/messages/count_tokens")


class OpenAIServer:
    """A server of OpenAI's kind with one model. It has the routes of ``paths``, and answers any other with
    ``missing``."""

    def __init__(self, model: str, *paths: str, missing: str = "404 Not Found") -> None:
        self.model = model
        self.paths = paths
        self.missing = missing
        self.requests: list[Exchange] = []

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.head.startswith(b"GET /v1/models "):
            await exchange.send(whole_response(json.dumps({"data": [{"id": self.model}]}).encode()))
        elif exchange.head.startswith(b"GET "):
            await exchange.send(whole_response(b"{}", status="404 Not Found"))
        else:
            self.requests.append(exchange)
            path = exchange.head.split(b" ")[1].decode()
            status = "200 OK" if path in self.paths else self.missing
            await exchange.send(whole_response(b'{"text": "hello", "detail": "Not Found"}', status=status))


@asynccontextmanager
async def serve_openai(**servers: OpenAIServer) -> AsyncIterator[RunningGateway]:
    async with AsyncExitStack() as stack:
        backends: dict[str, ScriptedServer] = {
            name: await stack.enter_async_context(serve(server)) for name, server in servers.items()
        }
        nodes = tuple(node(name, backend.url, kind=BackendKind.OPENAI) for name, backend in backends.items())
        yield await stack.enter_async_context(serve_nodes(nodes, spec=GatewaySpec(default_model="whisper")))


@pytest.mark.parametrize("model", ["whisper", None])
async def test_a_form_goes_to_the_node_with_its_model(model: str | None) -> None:
    """Byte by byte; the default model is added to a form that names none."""
    whisper, other = OpenAIServer("whisper", *ROUTES), OpenAIServer("other", *ROUTES)
    async with serve_openai(a=other, b=whisper) as fleet:
        data = {"language": "en"} if model is None else {"language": "en", "model": model}
        request = fleet.client.build_request(
            "POST", "/v1/audio/transcriptions", data=data, files={"file": ("a.wav", WAV, "audio/wav")}
        )
        await request.aread()
        answer = await fleet.client.send(request)
        assert (answer.status_code, answer.json()["text"]) == (200, "hello")
        assert answer.headers["X-GPUMesh-Node"] == "b"
        sent = whisper.requests[-1].body
        if model is None:
            boundary = request.content.split(b"\r\n")[0]
            added = boundary + b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
            assert sent == added + request.content
        else:
            assert sent == request.content
        assert not other.requests


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


NAMED = b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model": "whisper"}',
        form(NAMED, NAMED),
        form(NAMED, end=b"--b"),
        form(NAMED, end=b"--b--\r\nand more"),
        form(NAMED, end=b"--bc--"),
        b"before\r\n" + form(NAMED),
        form(b'Content-Disposition: form-data; name="model"; filename="m"\r\n\r\nwhisper'),
        form(b'Content-Disposition: form-data; name="a"\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper'),
        form(b'Content-Disposition: form-data; name="mo\\"del"\r\n\r\nwhisper'),
        form(b'Content-Disposition: form-data; name="model"\r\n\r\n\xff'),
        form(b"X: y\r\n\r\nwhisper"),
    ],
)
async def test_a_form_that_servers_could_read_differently_is_refused(body: bytes) -> None:
    whisper = OpenAIServer("whisper", *ROUTES)
    async with serve_openai(a=whisper) as fleet:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await fleet.client.post("/v1/audio/transcriptions", content=body, headers=headers)
        assert answer.status_code == 400
        assert not whisper.requests


@pytest.mark.parametrize("path", ROUTES)
async def test_a_route_that_is_not_known_goes_to_the_node_with_the_model(path: str) -> None:
    rank, other = OpenAIServer("rank", *ROUTES), OpenAIServer("other", *ROUTES)
    async with serve_openai(a=other, b=rank) as fleet:
        body = b'{"query": "q",  "model":"rank"}'
        answer = await fleet.client.post(f"{path}?x=1", content=body)
        assert answer.status_code == 404, "the server has no route with a query, by its script"
        answer = await fleet.client.post(path, content=body)
        assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "b")
        assert rank.requests[-1].body == body
        missing = await fleet.client.post(path, json={"model": "nobody"})
        assert missing.status_code == 404
        assert "model 'nobody' not found" in missing.text


@pytest.mark.parametrize("missing", ["404 Not Found", "405 Method Not Allowed", "501 Not Implemented", "500 Broken"])
async def test_a_server_without_the_route_is_not_blamed(missing: str) -> None:
    """The other server that has the model has the route; the first stays in use for everything else."""
    lacks, has = OpenAIServer("rank", "/v1/embeddings", missing=missing), OpenAIServer("rank", "/v1/rerank")
    async with serve_openai(a=lacks, b=has) as fleet:
        for _ in range(6):
            answer = await fleet.client.post("/v1/rerank", json={"model": "rank"})
            assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "b")
        is_gap = not missing.startswith("500")
        assert lacks.requests
        assert len(lacks.requests) == 1 or not is_gap, "it is not asked for this route again and again"
        named = {"X-GPUMesh-Node": "a"}
        answer = await fleet.client.post("/v1/embeddings", json={"model": "rank"}, headers=named)
        assert answer.status_code == 200
        answer = await fleet.client.post("/v1/rerank", json={"model": "rank"}, headers=named)
        assert answer.status_code == int(missing[:3]), "a node that the client names is asked all the same"


async def test_a_404_that_names_the_model_says_nothing_of_the_route() -> None:
    class Unloaded(OpenAIServer):
        async def __call__(self, exchange: Exchange) -> None:
            if exchange.head.startswith(b"POST "):
                self.requests.append(exchange)
                body = b'{"error": {"message": "The model `rank` does not exist"}}'
                await exchange.send(whole_response(body, status="404 Not Found"))
            else:
                await super().__call__(exchange)

    unloaded, has = Unloaded("rank"), OpenAIServer("rank", "/v1/rerank")
    async with serve_openai(a=unloaded, b=has) as fleet:
        assert (await fleet.client.post("/v1/rerank", json={"model": "rank"})).status_code == 200
        assert fleet.mesh._send_context.route_gaps.find_nodes("/v1/rerank") == frozenset()
        candidate = next(one for one in fleet.mesh.candidates() if one.name == "a")
        assert not candidate.broken_models, "what a client asks for there may be missing for any reason"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sleep", {}),
        ("/v1/load_lora_adapter", {"lora_name": "x"}),
        ("/shutdown", None),
        ("/v1/rerank/", {"model": "whisper"}),
        ("/v1//rerank", {"model": "whisper"}),
        ("/v1/../sleep", {"model": "whisper"}),
        ("/v1/%72erank", {"model": "whisper"}),
        ("/mesh/anything", {"model": "whisper"}),
    ],
)
async def test_what_names_no_model_or_no_plain_path_goes_nowhere(path: str, body: Any) -> None:
    server = OpenAIServer("whisper", *ROUTES)
    async with serve_openai(a=server) as fleet:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        answer = await send_raw(fleet.port, head.encode() + content)
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert not server.requests
