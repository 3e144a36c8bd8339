"""The one endpoint, as its clients see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gpumesh.errors import MeshAlreadyRunning, UsageError
from gpumesh.gateway.app import Gateway
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.lab.profile import Faults
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import GatewayPhase
from gpumesh.topology import BackendKind, GatewaySpec, PolicyKind, Topology
from tests.gateway.fleet import (
    MODEL,
    A,
    RunningGateway,
    events,
    lines,
    node,
    quick_host,
    send_raw,
    serve_hosts,
    serve_nodes,
)
from tests.mesh.servers import Exchange, serve, whole_response
from tests.tunnels.polling import wait_until

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": SCHEMA}}


@pytest.fixture
async def fleet() -> AsyncIterator[RunningGateway]:
    async with serve_hosts() as made:
        yield made


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
async def test_native_answers(fleet: RunningGateway, path: str, body: dict[str, Any], key: str) -> None:
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
    said = document["message"]["content"] if key == "message" else document["response"]
    told = [piece["message"]["content"] if key == "message" else piece["response"] for piece in pieces]
    assert "".join(told) == said
    for one in (streamed, answer):
        assert one.headers["X-GPUMesh-Node"] in ("a", "b")
        assert one.headers["X-GPUMesh-Attempts"] == "1"
        assert float(one.headers["X-GPUMesh-Queue-Ms"]) >= 0.0


async def test_tools_format_and_thinking(fleet: RunningGateway) -> None:
    called = (await fleet.chat(tools=[TOOL])).json()
    assert called["message"]["tool_calls"][0]["function"]["name"] == "weather"
    made = (await fleet.chat(format=SCHEMA)).json()
    assert set(json.loads(made["message"]["content"])) == {"city"}
    thought = (await fleet.chat(model="qwen3:8b", think=True)).json()
    assert thought["message"]["thinking"]
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
    one = await fleet.client.post("/api/embeddings", json={"model": embedder, "prompt": "one"})
    assert one.json()["embedding"] == many.json()["embeddings"][0]
    assert {answer.headers["X-GPUMesh-Node"] for answer in (many, one)} == {"a"}, "only it has the model"


async def test_show_is_asked_of_a_node_that_has_the_model(fleet: RunningGateway) -> None:
    for name in ("llama3.1:8b", "LLAMA3.1:8b"):
        asked = {"model": name.lower()}
        shown = await fleet.client.post("/api/show", json=asked)
        assert shown.json()["details"]["family"] == "llama"
        assert shown.headers["X-GPUMesh-Node"] == "b"
    assert (await fleet.client.post("/api/show", json={"name": MODEL})).status_code == 200


async def test_what_a_server_says_of_itself_comes_from_one_of_them(fleet: RunningGateway) -> None:
    answer = await fleet.client.get("/api/status")
    assert answer.status_code == 200
    assert answer.headers["X-GPUMesh-Node"] in ("a", "b")
    there = await fleet.client.post("/api/me", headers={"X-GPUMesh-Node": "b"})
    assert (there.status_code, there.headers["X-GPUMesh-Node"]) == (404, "b"), "the stand-in has no such route"


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


@pytest.mark.parametrize("kind", list(BackendKind))
@pytest.mark.parametrize("path", V1)
async def test_v1_answers(path: str, kind: BackendKind) -> None:
    """In one piece unless a stream is asked for; from servers of either kind."""
    async with serve_hosts(kind=kind) as fleet:
        whole_answer = await fleet.client.post(path, json=V1[path])
        assert whole_answer.status_code == 200
        assert whole_answer.headers["Content-Type"].startswith("application/json")
        assert whole_answer.json()["usage"]
        streamed = await fleet.client.post(path, json={**V1[path], "stream": True})
        assert streamed.headers["Content-Type"].startswith("text/event-stream")
        last = events(streamed.text)[-1]
        assert ENDS[path] in (last, isinstance(last, dict) and last.get("type"))
        for one in (whole_answer, streamed):
            assert one.headers["X-GPUMesh-Node"] in ("a", "b")


async def test_v1_embeddings_and_one_model(fleet: RunningGateway) -> None:
    made = await fleet.client.post("/v1/embeddings", json={"model": "nomic-embed-text", "input": "one"})
    assert len(made.json()["data"]) == 1
    one = await fleet.client.get("/v1/models/llama3.1:8b")
    assert one.json()["id"] == "llama3.1:8b"
    assert one.headers["X-GPUMesh-Node"] == "b"
    absent = await fleet.client.get("/v1/models/nobody/has:it")
    assert absent.status_code == 404
    assert absent.json()["error"]["type"] == "not_found_error"


async def test_native_routes_need_an_ollama() -> None:
    async with serve_hosts(kind=BackendKind.OPENAI) as fleet:
        answer = await fleet.chat()
        assert answer.status_code == 503
        assert "speaks this API" in answer.json()["error"]
        assert (await fleet.client.get("/v1/models")).json()["data"]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/api/chat", "nobody:1b"),
        ("/api/generate", "nobody:1b"),
        ("/api/embed", "nobody:1b"),
        ("/api/show", "nobody:1b"),
        ("/v1/chat/completions", "nobody:1b"),
        ("/v1/messages", "nobody:1b"),
    ],
)
async def test_a_model_that_nobody_has(fleet: RunningGateway, path: str, model: str) -> None:
    answer = await fleet.client.post(path, json={**CHAT, "model": model, "max_tokens": 5})
    assert answer.status_code == 404
    error = answer.json()["error"]
    if path.startswith("/api/"):
        words = error
    else:
        assert error["type"] == "not_found_error"
        words = error["message"]
    if path == "/v1/messages":
        assert answer.json()["type"] == "error"
    assert words.startswith("model 'nobody:1b' not found")
    assert "could be pulled to a, b" in words
    assert MODEL in words


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/api/chat", b"", 400, "missing request body"),
        ("POST", "/api/chat", b"{", 400, "not JSON"),
        ("POST", "/api/chat", b"[1]", 400, "not a JSON object"),
        ("POST", "/api/generate", b"{}", 400, "model is required"),
        ("POST", "/v1/chat/completions", b"{}", 400, "model is required"),
        ("POST", "/v1/messages", b"nonsense", 400, "not JSON"),
        ("POST", "/api/pull", b"{}", 400, "model is required"),
        ("DELETE", "/api/delete", b'{"model": 3}', 400, "model is required"),
        ("GET", "/api/nothing", b"", 404, "there is no /api/nothing here"),
        ("GET", "/v1/nothing", b"", 404, "there is no /v1/nothing here"),
        ("PROPFIND", "/", b"", 405, "not allowed"),
    ],
)
async def test_the_clients_own_mistakes(
    fleet: RunningGateway, method: str, path: str, body: bytes, status: int, words: str
) -> None:
    answer = await fleet.client.request(method, path, content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in (error if path.startswith("/api/") or path == "/" else error["message"])
    assert fleet.hosts["a"].counters.started == 0


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/api/chat", "POST"),
        ("POST", "/api/tags", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/api/delete", "DELETE"),
        ("GET", "/api/blobs/sha256:1", "HEAD, POST"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(fleet: RunningGateway, method: str, path: str, allow: str) -> None:
    answer = await fleet.client.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allow)


async def test_a_servers_own_words_reach_the_client(fleet: RunningGateway) -> None:
    refused = await fleet.chat(think=True)
    assert refused.status_code == 400
    assert refused.json() == {"error": f'"{MODEL}" does not support thinking'}
    assert refused.headers["X-GPUMesh-Attempts"] == "1", "the client's mistake is no reason to ask others"


async def test_when_every_node_fails_it_is_told_in_the_servers_words(fleet: RunningGateway) -> None:
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=500, paths=("/api/chat", "/v1/chat")))
    native = await fleet.chat()
    assert native.status_code == 500
    assert "model runner has unexpectedly stopped" in native.json()["error"]
    openai = await fleet.client.post("/v1/chat/completions", json=CHAT)
    assert openai.json()["error"]["type"] == "api_error"


# -- what the request's head says ------------------------------------------------------------------------------------


async def test_a_node_can_be_named(fleet: RunningGateway) -> None:
    for name in ("a", "b"):
        answer = await fleet.chat(headers={"X-GPUMesh-Node": name})
        assert answer.headers["X-GPUMesh-Node"] == name
    refused = await fleet.chat(headers={"X-GPUMesh-Node": "nowhere"})
    assert refused.status_code == 400
    assert "the nodes are: a, b" in refused.json()["error"]
    missing = await fleet.chat(model="llama3.1:8b", headers={"X-GPUMesh-Node": "a"})
    assert missing.status_code == 404


async def test_a_request_has_the_name_that_its_client_gave_it(fleet: RunningGateway) -> None:
    assert (await fleet.chat(headers={"X-Request-Id": "r-1"})).headers["X-Request-Id"] == "r-1"
    assert "X-Request-Id" not in (await fleet.chat()).headers
    assert len((await fleet.chat(headers={"X-Request-Id": "x" * 500})).headers["X-Request-Id"]) == 128


@pytest.mark.parametrize(
    "headers", [{"X-GPUMesh-Priority": "urgent"}, {"X-GPUMesh-Timeout": "soon"}, {"X-GPUMesh-Timeout": "-1"}]
)
async def test_nonsense_in_our_own_headers_is_refused(fleet: RunningGateway, headers: dict[str, str]) -> None:
    assert (await fleet.chat(headers=headers)).status_code == 400


async def test_the_default_model_is_what_the_server_is_asked_for() -> None:
    async with serve_hosts(spec=GatewaySpec(default_model=MODEL)) as fleet:
        answer = await fleet.client.post("/api/chat", json={"messages": CHAT["messages"], "stream": False})
        assert answer.status_code == 200
        assert answer.json()["model"] == MODEL


class Recorder:
    """An Ollama that answers every chat with one line and keeps what it was sent."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []

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
        self.seen.append(exchange)
        await exchange.send(whole_response(b'{"done": true}'))

    @property
    def head(self) -> dict[str, str]:
        heads = self.seen[-1].head.decode().split("\r\n")[1:-2]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in heads)}


async def test_what_a_backend_gets_is_what_the_client_sent() -> None:
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
        assert recorder.seen[-1].body == body, "byte for byte"
        assert recorder.seen[-1].head.startswith(b"POST /api/chat?debug=1 HTTP/1.1\r\n")
        head = recorder.head
        assert head["host"] == f"127.0.0.1:{backend.port}"
        assert head["content-type"] == headers["Content-Type"]
        assert (head["user-agent"], head["x-vendor"]) == ("a-client/1.0", "kept")
        dropped = {"origin", "referer", "cookie", "authorization", "x-forwarded-for", "sec-fetch-mode"}
        assert not dropped & set(head)
        assert not any(name.startswith("x-gpumesh-") for name in head)


async def test_a_packed_body_is_unpacked() -> None:
    import gzip

    recorder = Recorder()
    async with serve(recorder) as backend, serve_nodes((node("a", backend.url),)) as fleet:
        body = json.dumps({**CHAT, "stream": False}).encode()
        packed = {"Content-Encoding": "gzip"}
        assert (await fleet.client.post("/api/chat", content=gzip.compress(body), headers=packed)).status_code == 200
        assert recorder.seen[-1].body == body
        assert "content-encoding" not in recorder.head
        wrong = await fleet.client.post("/api/chat", content=b"no gzip at all", headers=packed)
        assert wrong.status_code == 400


async def test_a_bomb_in_a_packed_body_is_refused() -> None:
    import gzip

    async with serve_hosts(A, bounds=Bounds(max_body_bytes=1 << 20)) as fleet:
        bomb = gzip.compress(b" " * (50 << 20))
        assert len(bomb) < 1 << 20
        answer = await fleet.client.post("/api/chat", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 413


# -- failover, queue and drain, as a client sees them ----------------------------------------------------------------


async def test_a_failed_attempt_shows_in_the_head_only() -> None:
    async with serve_hosts(spec=GatewaySpec(policy=PolicyKind.ROUND_ROBIN)) as fleet:
        await fleet.hosts["a"].set_faults(Faults(disconnect=True, paths=("/api/chat",)))
        answers = [await fleet.chat() for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert {answer.headers["X-GPUMesh-Node"] for answer in answers} == {"b"}
        assert any(answer.headers["X-GPUMesh-Attempts"] == "2" for answer in answers)


SLOW = quick_host("slow", tokens_per_s=20.0, answer_tokens=(2000, 2000))


async def test_who_waits_is_seen_with_its_place_in_the_queue() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        waiting = []
        for name, priority in (("r-batch", "batch"), ("r-normal", "normal"), ("r-now", "interactive")):
            headers = {"X-Request-Id": name, "X-GPUMesh-Priority": priority}
            waiting.append(tasks.create_task(fleet.chat(headers=headers)))
            await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == len(waiting), "it waits")
        gateway = (await fleet.client.get("/mesh/status")).json()["gateway"]
        assert (gateway["in_flight"], gateway["queued"]) == (1, 3)
        assert [entry["id"] for entry in gateway["waiting"]] == ["r-now", "r-normal", "r-batch"]
        assert [entry["position"] for entry in gateway["waiting"]] == [0, 1, 2]
        assert {entry["model"] for entry in gateway["waiting"]} == {MODEL}
        assert all(entry["waited_s"] >= 0 for entry in gateway["waiting"])
        for task in (first, *waiting):
            task.cancel()


async def test_a_client_that_leaves_leaves_the_queue_and_stops_the_generation() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet:
        first = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        second = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "the second waits")
        second.cancel()
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 0, "it has left the queue")
        assert fleet.count_running() == 1
        first.cancel()
        await wait_until(lambda: fleet.count_running() == 0, "the host has stopped")
        await wait_until(lambda: fleet.mesh.request_counters.in_flight == 0, "the books are closed")
        books = fleet.mesh.request_counters
        assert (books.accepted, books.cancelled, books.failed) == (2, 2, 0)


async def test_past_the_bound_of_the_queue_clients_are_told_when_to_come_back() -> None:
    async with serve_hosts(SLOW, max_parallel=1, spec=GatewaySpec(max_queue=1)) as fleet, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        second = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "the second waits")
        refused = await fleet.chat()
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "1 requests wait already" in refused.json()["error"]
        openai = await fleet.client.post("/v1/chat/completions", json=CHAT)
        assert (openai.status_code, openai.json()["error"]["type"]) == (503, "api_error")
        anthropic = await fleet.client.post("/v1/messages", json={**CHAT, "max_tokens": 5})
        assert anthropic.json()["error"]["type"] == "overloaded_error"
        for task in (first, second):
            task.cancel()


async def test_a_deadline_holds_while_a_request_waits() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        late = await fleet.chat(headers={"X-GPUMesh-Timeout": "0.2"})
        assert late.status_code == 504
        assert "no place became free" in late.json()["error"]
        assert fleet.mesh.snapshot().gateway.queued == 0
        assert fleet.hosts["slow"].counters.started == 1
        first.cancel()


async def test_a_deadline_holds_while_a_node_works() -> None:
    async with serve_hosts(SLOW) as fleet:
        late = await fleet.chat(headers={"X-GPUMesh-Timeout": "0.3"})
        assert late.status_code == 504
        await wait_until(lambda: fleet.count_running() == 0, "the host has stopped")


@pytest.mark.slow
async def test_a_drained_node_ends_what_it_has_and_gets_nothing_new() -> None:
    hosts = (replace(SLOW, name="a"), quick_host("b"))
    async with serve_hosts(*hosts, max_parallel=4) as fleet:
        body = {**CHAT, "options": {"num_predict": 15}}
        async with fleet.client.stream("POST", "/api/chat", json=body, headers={"X-GPUMesh-Node": "a"}) as begun:
            pieces = begun.aiter_lines()
            await anext(pieces)
            fleet.mesh.drain("a")
            answers = [await fleet.chat() for _ in range(5)]
            assert {answer.headers["X-GPUMesh-Node"] for answer in answers} == {"b"}
            assert fleet.mesh.snapshot().node("a").health == "draining"
            rest = [json.loads(line) async for line in pieces]
        assert rest[-1]["done"] is True, "what ran there was not touched"
        only = await fleet.chat(headers={"X-GPUMesh-Node": "a"})
        assert only.status_code == 503
        fleet.mesh.resume("a")
        again = await fleet.chat(headers={"X-GPUMesh-Node": "a"}, options={"num_predict": 1})
        assert again.headers["X-GPUMesh-Node"] == "a"


# -- lifetime --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_closing_finishes_what_is_in_flight_and_takes_nothing_new() -> None:
    profile = quick_host("a", tokens_per_s=50.0, answer_tokens=(25, 25), slots=4)
    async with serve_hosts(profile, max_parallel=2) as fleet, AsyncExitStack() as ends:
        gateway = await ends.enter_async_context(Gateway(fleet.mesh, port=0))
        async with httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=20) as client:
            await client.get("/")  # a kept connection, which must not hold up the end
            answers = [asyncio.create_task(client.post("/api/chat", json=CHAT)) for _ in range(3)]
            await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "two are in flight, one waits")
            closing = asyncio.create_task(ends.aclose())
            await wait_until(lambda: fleet.mesh.gateway.state is GatewayPhase.DRAINING, "it drains")
            with pytest.raises(httpx.TransportError):
                await client.get("/healthz")
            done = [await answer for answer in answers]
            assert [lines(answer.text)[-1]["done"] for answer in done] == [True] * 3
            await closing
            assert fleet.mesh.gateway.state is GatewayPhase.OFF


async def test_closing_waits_no_longer_than_it_may_and_says_why_it_cuts() -> None:
    """In a stream that has begun, and with a status where nothing was sent."""
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(serve_hosts(SLOW, max_parallel=1))
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=20))
        ends = AsyncExitStack()
        gateway = await ends.enter_async_context(Gateway(fleet.mesh, port=0, drain_s=0.1))
        begun = await stack.enter_async_context(client.stream("POST", f"{gateway.url}/api/chat", json=CHAT))
        told = begun.aiter_lines()
        await anext(told)
        waiting = asyncio.create_task(client.post(f"{gateway.url}/v1/chat/completions", json=CHAT))
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "the second waits")
        loop = asyncio.get_running_loop()
        asked = loop.time()
        await ends.aclose()
        assert loop.time() - asked < 10.0
        rest = [json.loads(line) async for line in told]
        assert rest[-1] == {"error": "the gateway was stopped"}
        refused = await waiting
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        assert refused.json()["error"]["message"].startswith("the gateway was stopped")
        await wait_until(lambda: fleet.count_running() == 0, "the host has stopped")
        books = fleet.mesh.request_counters
        assert (books.accepted, books.in_flight) == (2, 0)


async def test_progress_that_is_cut_ends_with_an_error_too() -> None:
    """It is no generated stream, which would hear of its deadline; and it is told at once when it is hurried."""
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(serve_hosts(quick_host("a", pull_s=60.0)))
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=20))
        ends, hurried = AsyncExitStack(), asyncio.Event()
        gateway = await ends.enter_async_context(Gateway(fleet.mesh, port=0, drain_s=60.0, stop_now=hurried))
        pull = client.stream("POST", f"{gateway.url}/api/pull", json={"model": "llama3.2:1b"})
        told = (await stack.enter_async_context(pull)).aiter_lines()
        await anext(told)
        closing = asyncio.create_task(ends.aclose())
        await wait_until(lambda: fleet.mesh.gateway.state is GatewayPhase.DRAINING, "it drains")
        hurried.set()
        assert json.loads([line async for line in told][-1]) == {"error": "the gateway was stopped"}
        await closing


async def test_an_address_that_is_taken_says_so(fleet: RunningGateway) -> None:
    with pytest.raises(MeshAlreadyRunning, match="cannot listen on 127"):
        async with Gateway(fleet.mesh, port=fleet.port):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box.example.org"])
async def test_nothing_is_opened_to_others_without_a_key(host: str) -> None:
    mesh = Mesh(Topology("t", (), GatewaySpec(host=host, port=0)))
    with pytest.raises(UsageError, match="lets other machines use your GPUs"):
        Gateway(mesh)


async def test_beyond_loopback_with_a_key_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "k-12345")
    async with serve_hosts(A, spec=GatewaySpec(host="0.0.0.0", api_key_env="GATEWAY_KEY")) as fleet:
        assert "without encryption" in caplog.text
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{fleet.port}", trust_env=False)
        async with client:
            assert (await client.get("/api/tags")).status_code == 401
            assert (await client.get("/api/tags", headers={"x-api-key": "k-12345"})).status_code == 200
            assert (await client.get("/api/tags", headers={"Authorization": "Bearer k-12345"})).status_code == 200
            assert (await client.get("/healthz")).status_code == 200, "whether we are well is no secret"
            assert (await client.get("/metrics")).status_code == 401
            refused = await client.post("/v1/messages", json={})
            assert refused.json()["error"]["type"] == "authentication_error"


async def test_a_bug_inside_costs_one_answer_and_leaves_a_trace(
    fleet: RunningGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(kinds: object) -> None:
        raise RuntimeError("a bug with a secret in it")

    monkeypatch.setattr(fleet.mesh, "usable_nodes", broken)
    answer = await fleet.client.get("/api/tags")
    assert answer.status_code == 500
    assert answer.json() == {"error": "the gateway failed inside"}
    assert "a bug with a secret in it" in caplog.text
    monkeypatch.undo()
    assert (await fleet.client.get("/api/tags")).status_code == 200


# -- browsers --------------------------------------------------------------------------------------------------------

PAGE = "https://chat.example.org"


async def test_a_page_on_the_list_may_read_answers_streams_too() -> None:
    async with serve_hosts(A, spec=GatewaySpec(cors_origins=(PAGE,))) as fleet:
        asks = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, x-stainless-os",
        }
        preflight = await fleet.client.options("/api/chat", headers=asks)
        assert preflight.status_code == 204
        assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "x-stainless-os" in preflight.headers["Access-Control-Allow-Headers"]
        streamed = await fleet.client.post("/api/chat", json=CHAT, headers={"Origin": PAGE})
        assert streamed.headers["Access-Control-Allow-Origin"] == PAGE
        assert streamed.headers["Vary"] == "Origin"
        failed = await fleet.client.post("/api/chat", json={}, headers={"Origin": PAGE})
        assert failed.headers["Access-Control-Allow-Origin"] == PAGE, "a page must be able to read why"


async def test_a_preflight_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "k-12345")
    async with serve_hosts(A, spec=GatewaySpec(cors_origins=(PAGE,), api_key_env="GATEWAY_KEY")) as fleet:
        asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        assert (await fleet.client.options("/api/chat", headers=asks)).status_code == 204
        assert (await fleet.client.post("/api/chat", json=CHAT, headers={"Origin": PAGE})).status_code == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://[", "::"])
async def test_other_pages_may_not_even_ask(fleet: RunningGateway, origin: str) -> None:
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for answer in (
        await fleet.client.options("/api/chat", headers=asks),
        await fleet.client.post("/api/chat", json=CHAT, headers={"Origin": origin}),
        await fleet.client.get("/api/tags", headers={"Origin": origin}),
    ):
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert fleet.hosts["a"].counters.started == 0


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11430", "", "8.8.8.8"])
async def test_a_name_that_was_rebound_to_this_machine_gets_nothing(fleet: RunningGateway, host: str) -> None:
    answer = await send_raw(fleet.port, f"GET /api/tags HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert MODEL.encode() not in answer


# -- nothing of one client in another's ------------------------------------------------------------------------------


async def test_nothing_that_a_client_sends_shows_up_elsewhere(fleet: RunningGateway) -> None:
    mark = "zyzzyva"
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=500, paths=("/api/generate",)))
    headers = {"X-GPUMesh-Session": mark, "X-GPUMesh-Node": mark, "Cookie": mark}
    await fleet.chat(mark, model=mark)
    await fleet.chat(mark, headers=headers)
    await fleet.chat(mark, headers={"X-GPUMesh-Session": mark})
    await fleet.client.post("/api/generate", json={"model": MODEL, "prompt": mark})
    await fleet.client.get(f"/{mark}", headers={"User-Agent": mark})
    await send_raw(fleet.port, f"{mark} {mark} {mark}\r\n\r\n".encode())
    seen = [
        await fleet.client.post("/api/generate", json={"model": MODEL, "prompt": "mine"}),
        await fleet.chat(model="other:1b"),
        await fleet.client.get("/mesh/status"),
        await fleet.client.get("/metrics"),
        await fleet.client.get("/healthz"),
        await fleet.client.get("/nowhere"),
    ]
    assert [mark in answer.text for answer in seen] == [False] * 6
