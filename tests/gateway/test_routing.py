"""Each route, as its clients see it: Ollama's own, ``/v1``, and what of a request reaches the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.topology import BackendKind, GatewaySpec
from tests.gateway.fleet import (
    CHAT,
    MODEL,
    A,
    RunningGateway,
    events,
    lines,
    node,
    quick_host,
    serve_hosts,
    serve_nodes,
)
from tests.mesh.servers import Exchange, serve, whole_response

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": SCHEMA}}

# -- native routes -------------------------------------------------------------------------------------------------


async def test_the_root_says_what_ollama_says(fleet: RunningGateway) -> None:
    answer = await fleet.client.get("/")
    assert (answer.status_code, answer.text) == (200, "Ollama is running")
    assert answer.headers["Server"] == "gpumesh"
    head = await fleet.client.head("/")
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", "17")


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/api/chat", CHAT, "message"),
        ("/api/generate", {"model": MODEL, "prompt": "hello"}, "response"),
    ],
)
async def test_ollamas_routes_answer_streamed_and_whole(
    fleet: RunningGateway, path: str, body: dict[str, Any], key: str
) -> None:
    """Streamed by default; the same text in one piece when asked for."""
    streamed = await fleet.client.post(path, json=body)
    assert streamed.headers["Content-Type"] == "application/x-ndjson"
    *pieces, last = lines(streamed.text)
    assert pieces
    assert last["done"] is True
    assert last["done_reason"] == "stop"
    assert last["eval_count"] > 0
    answer = await fleet.client.post(path, json={**body, "stream": False})
    assert answer.headers["Content-Type"].startswith("application/json")
    document = answer.json()
    whole_text = document["message"]["content"] if key == "message" else document["response"]
    streamed_texts = [piece["message"]["content"] if key == "message" else piece["response"] for piece in pieces]
    assert "".join(streamed_texts) == whole_text
    for response in (streamed, answer):
        assert response.headers["X-GPUMesh-Node"] in ("a", "b")
        assert response.headers["X-GPUMesh-Attempts"] == "1"
        assert float(response.headers["X-GPUMesh-Queue-Ms"]) >= 0.0


async def test_tools_format_and_thinking(fleet: RunningGateway) -> None:
    called = (await fleet.chat(tools=[TOOL])).json()
    assert called["message"]["tool_calls"][0]["function"]["name"] == "weather"
    formatted = (await fleet.chat(format=SCHEMA)).json()
    assert set(json.loads(formatted["message"]["content"])) == {"city"}
    thinking = (await fleet.chat(model="qwen3:8b", think=True)).json()
    assert thinking["message"]["thinking"]
    streamed = await fleet.client.post("/api/chat", json={**CHAT, "model": "qwen3:8b"})
    assert any(line["message"].get("thinking") for line in lines(streamed.text) if "message" in line)


async def test_images_travel_in_the_body(fleet: RunningGateway) -> None:
    message = {"role": "user", "content": "what is this?", "images": ["iVBOR" + "A" * 3_000_000]}
    answer = await fleet.chat(messages=[message])
    assert answer.status_code == 200


async def test_loading_and_unloading(fleet: RunningGateway) -> None:
    loaded = await fleet.client.post("/api/generate", json={"model": MODEL, "keep_alive": "5m"})
    assert lines(loaded.text)[-1]["done_reason"] == "load"
    listed = (await fleet.client.get("/api/ps")).json()["models"]
    assert [entry["name"] for entry in listed] == [MODEL]
    on = loaded.headers["X-GPUMesh-Node"]
    gone = await fleet.client.post(
        "/api/generate", json={"model": MODEL, "keep_alive": 0}, headers={"X-GPUMesh-Node": on}
    )
    assert lines(gone.text)[-1]["done_reason"] == "unload"
    assert (await fleet.client.get("/api/ps")).json() == {"models": []}


async def test_embeddings(fleet: RunningGateway) -> None:
    embedder = "nomic-embed-text"
    many = await fleet.client.post("/api/embed", json={"model": embedder, "input": ["one", "two"]})
    assert len(many.json()["embeddings"]) == 2
    single = await fleet.client.post("/api/embeddings", json={"model": embedder, "prompt": "one"})
    assert single.json()["embedding"] == many.json()["embeddings"][0]
    assert {answer.headers["X-GPUMesh-Node"] for answer in (many, single)} == {"a"}, "only it has the model"


async def test_show_is_asked_of_a_node_that_has_the_model(fleet: RunningGateway) -> None:
    for name in ("llama3.1:8b", "LLAMA3.1:8b"):
        asked = {"model": name.lower()}
        shown = await fleet.client.post("/api/show", json=asked)
        assert shown.json()["details"]["family"] == "llama"
        assert shown.headers["X-GPUMesh-Node"] == "b"
    assert (await fleet.client.post("/api/show", json={"name": MODEL})).status_code == 200


async def test_questions_about_a_server_go_to_any_node(fleet: RunningGateway) -> None:
    answer = await fleet.client.get("/api/status")
    assert answer.status_code == 200
    assert answer.headers["X-GPUMesh-Node"] in ("a", "b")
    on_b = await fleet.client.post("/api/me", headers={"X-GPUMesh-Node": "b"})
    assert (on_b.status_code, on_b.headers["X-GPUMesh-Node"]) == (404, "b"), "the stand-in has no such route"


# -- /v1 -----------------------------------------------------------------------------------------------------------

V1: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": "hello"},
    "/v1/responses": {"model": MODEL, "input": "hello"},
    "/v1/messages": {**CHAT, "max_tokens": 50},
}
ENDS = {
    "/v1/chat/completions": "[DONE]",
    "/v1/completions": "[DONE]",
    "/v1/responses": "response.completed",
    "/v1/messages": "message_stop",
}


@pytest.mark.parametrize("kind", [BackendKind.AUTO, BackendKind.OLLAMA, BackendKind.OPENAI])
@pytest.mark.parametrize("path", V1)
async def test_v1_routes_answer_streamed_and_whole(path: str, kind: BackendKind) -> None:
    """In one piece unless a stream is asked for, from a server of each kind that the simulated one can be."""
    async with serve_hosts(kind=kind) as fleet:
        whole_answer = await fleet.client.post(path, json=V1[path])
        assert whole_answer.status_code == 200
        assert whole_answer.headers["Content-Type"].startswith("application/json")
        assert whole_answer.json()["usage"]
        streamed = await fleet.client.post(path, json={**V1[path], "stream": True})
        assert streamed.headers["Content-Type"].startswith("text/event-stream")
        last = events(streamed.text)[-1]
        assert ENDS[path] in (last, isinstance(last, dict) and last.get("type"))
        for response in (whole_answer, streamed):
            assert response.headers["X-GPUMesh-Node"] in ("a", "b")


async def test_v1_embeddings_and_the_entry_of_a_model(fleet: RunningGateway) -> None:
    embedded = await fleet.client.post("/v1/embeddings", json={"model": "nomic-embed-text", "input": "one"})
    assert len(embedded.json()["data"]) == 1
    entry = await fleet.client.get("/v1/models/llama3.1:8b")
    assert entry.json()["id"] == "llama3.1:8b"
    assert entry.headers["X-GPUMesh-Node"] == "b"
    absent = await fleet.client.get("/v1/models/nobody/has:it")
    assert absent.status_code == 404
    assert absent.json()["error"]["type"] == "not_found_error"


async def test_ollamas_routes_need_an_ollama() -> None:
    async with serve_hosts(kind=BackendKind.OPENAI) as fleet:
        answer = await fleet.chat()
        assert answer.status_code == 503
        assert "speaks this API" in answer.json()["error"]
        assert (await fleet.client.get("/v1/models")).json()["data"]


# -- headers of the request ------------------------------------------------------------------------------------------


async def test_a_node_can_be_named(fleet: RunningGateway) -> None:
    for name in ("a", "b"):
        answer = await fleet.chat(headers={"X-GPUMesh-Node": name})
        assert answer.headers["X-GPUMesh-Node"] == name
    refused = await fleet.chat(headers={"X-GPUMesh-Node": "nowhere"})
    assert refused.status_code == 400
    assert "the nodes are: a, b" in refused.json()["error"]
    missing = await fleet.chat(model="llama3.1:8b", headers={"X-GPUMesh-Node": "a"})
    assert missing.status_code == 404


async def test_the_clients_request_id_is_in_the_answer(fleet: RunningGateway) -> None:
    assert (await fleet.chat(headers={"X-Request-Id": "r-1"})).headers["X-Request-Id"] == "r-1"
    assert "X-Request-Id" not in (await fleet.chat()).headers
    assert len((await fleet.chat(headers={"X-Request-Id": "x" * 500})).headers["X-Request-Id"]) == 128


async def test_a_named_conversation_stays_on_its_node_however_short_it_is() -> None:
    async with serve_hosts(quick_host("a"), quick_host("b")) as fleet:
        for name in "ab":
            await fleet.chat(headers={"X-GPUMesh-Node": name})  # loads the model
        first = (await fleet.chat(headers={"X-GPUMesh-Session": "s"})).headers["X-GPUMesh-Node"]
        for number in range(4):
            for other in range(2):  # so that it would be the other node's turn
                await fleet.chat(f"another {number} {other}")
            answer = await fleet.chat("and more " * (20 * number), headers={"X-GPUMesh-Session": "s"})
            assert answer.headers["X-GPUMesh-Node"] == first


@pytest.mark.parametrize(
    "headers", [{"X-GPUMesh-Priority": "urgent"}, {"X-GPUMesh-Timeout": "soon"}, {"X-GPUMesh-Timeout": "-1"}]
)
async def test_nonsense_in_gpumesh_headers_is_refused(fleet: RunningGateway, headers: dict[str, str]) -> None:
    assert (await fleet.chat(headers=headers)).status_code == 400


async def test_the_default_model_is_put_into_the_body() -> None:
    async with serve_hosts(spec=GatewaySpec(default_model=MODEL)) as fleet:
        answer = await fleet.client.post("/api/chat", json={"messages": CHAT["messages"], "stream": False})
        assert answer.status_code == 200
        assert answer.json()["model"] == MODEL


class Recorder:
    """An Ollama that answers every chat with one line and keeps the requests that it got."""

    def __init__(self) -> None:
        self.requests: list[Exchange] = []

    async def __call__(self, exchange: Exchange) -> None:
        answers = {
            b"GET /api/version ": b'{"version": "0.12.6"}',
            b"GET /api/tags ": json.dumps({"models": [{"name": MODEL}]}).encode(),
            b"GET /api/ps ": b'{"models": []}',
        }
        for start, body in answers.items():
            if exchange.head.startswith(start):
                await exchange.send(whole_response(body))
                return
        self.requests.append(exchange)
        await exchange.send(whole_response(b'{"done": true}'))

    @property
    def head(self) -> dict[str, str]:
        heads = self.requests[-1].head.decode().split("\r\n")[1:-2]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in heads)}


async def test_a_backend_gets_the_body_as_the_client_sent_it() -> None:
    recorder = Recorder()
    async with serve(recorder) as backend, serve_nodes((node("a", backend.url),)) as fleet:
        body = b'{"model":"%s",  "future_field": {"x": [1, 2.50]},"stream":false}' % MODEL.encode()
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": "a-client/1.0",
            "X-Vendor": "kept",
            "Origin": "http://localhost:3000",
            "Referer": "http://localhost:3000/page",
            "Cookie": "secret=1",
            "Authorization": "Bearer of-the-gateway",
            "X-Forwarded-For": "1.2.3.4",
            "X-GPUMesh-Priority": "batch",
            "Sec-Fetch-Mode": "cors",
        }
        answer = await fleet.client.post("/api/chat?debug=1", content=body, headers=headers)
        assert answer.status_code == 200
        assert recorder.requests[-1].body == body, "byte for byte"
        assert recorder.requests[-1].head.startswith(b"POST /api/chat?debug=1 HTTP/1.1\r\n")
        head = recorder.head
        assert head["host"] == f"127.0.0.1:{backend.port}"
        assert head["content-type"] == headers["Content-Type"]
        assert (head["user-agent"], head["x-vendor"]) == ("a-client/1.0", "kept")
        dropped = {"origin", "referer", "cookie", "authorization", "x-forwarded-for", "sec-fetch-mode"}
        assert not dropped & set(head)
        assert not any(name.startswith("x-gpumesh-") for name in head)


async def test_a_compressed_body_is_decompressed() -> None:
    import gzip

    recorder = Recorder()
    async with serve(recorder) as backend, serve_nodes((node("a", backend.url),)) as fleet:
        body = json.dumps({**CHAT, "stream": False}).encode()
        packed = {"Content-Encoding": "gzip"}
        assert (await fleet.client.post("/api/chat", content=gzip.compress(body), headers=packed)).status_code == 200
        assert recorder.requests[-1].body == body
        assert "content-encoding" not in recorder.head
        wrong = await fleet.client.post("/api/chat", content=b"no gzip at all", headers=packed)
        assert wrong.status_code == 400


async def test_a_decompression_bomb_is_refused() -> None:
    import gzip

    async with serve_hosts(A, bounds=Bounds(max_body_bytes=1 << 20)) as fleet:
        bomb = gzip.compress(b" " * (50 << 20))
        assert len(bomb) < 1 << 20
        answer = await fleet.client.post("/api/chat", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {"Model": "llama3.1:8b", "Messages": CHAT["messages"], "Stream": False},
        {"model": "library/llama3.1:8b", "messages": CHAT["messages"], "stream": False},
        {"MODEL": "registry.ollama.ai/library/Llama3.1:8b", "messages": CHAT["messages"], "stream": False},
    ],
)
async def test_a_name_as_ollama_reads_it_reaches_its_own_model(body: dict[str, Any]) -> None:
    """And not the default model: Go ignores case, and Ollama adds its registry to a name."""
    async with serve_hosts(spec=GatewaySpec(default_model=MODEL)) as fleet:
        for path in ("/api/chat", "/v1/chat/completions"):
            answer = await fleet.client.post(path, json=body)
            assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "b")
