"""The rules of mesh.yaml for models and keys, over real sockets: which node gets what, and what the client sees."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.errors import ModelMissing, ServersFailed
from gpumesh.gateway.app import Gateway
from gpumesh.lab.profile import EMBEDDER, LLAMA_8B
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import BackendKind, GatewaySpec, KeySpec, ModelSpec, Priority, Topology
from tests.gateway.fleet import MODEL, RunningGateway, lines, node
from tests.http_clients import loopback_client

LLAMA_ON_VLLM = "meta-llama/Llama-3.1-8B-Instruct"
LLAMA_RULES = ModelSpec(LLAMA_8B.name, aliases=(LLAMA_ON_VLLM, "assistant"))
CHAT = {"messages": [{"role": "user", "content": "hello"}], "stream": False}


class StandIn:
    """A server of either API that remembers each body it gets, and answers any model it lists."""

    def __init__(self, *models: str, kind: BackendKind = BackendKind.OLLAMA) -> None:
        self.models = list(models)
        self.kind = kind
        self.bodies: list[dict[str, Any]] = []
        self.raw_bodies: list[bytes] = []
        self.fails_with: int | None = None
        self.ends_connections = False  # at each request, instead of an answer
        self.remaining_cuts: list[str] = []
        self.url = ""
        self.connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections[task] = writer
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lower = head.lower()
                length = int(lower.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
                method, path = head.split(b" ")[0].decode(), head.split(b" ")[1].decode()
                status, kind, data, is_cut = self.answer(method, path, body)
                if self.ends_connections and method == "POST":
                    return
                framing = f"Content-Length: {len(data) + (10 if is_cut else 0)}"
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode() + data)
                await writer.drain()
                if is_cut:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str, bytes, bool]:
        """Status, type, body, and whether the connection ends before the body does."""
        if method == "GET":
            return self.answer_probe(path)
        self.raw_bodies.append(body)
        document = json.loads(body)
        self.bodies.append({"path": path, **document})
        if self.fails_with is not None:
            return self.fails_with, "application/json", b'{"error":"no"}', False
        model = document["model"]
        if model not in self.models:
            return 404, "application/json", b'{"error":"model not found"}', False
        if path == "/api/chat" and document.get("stream", True):
            frames = [
                {"model": model, "message": {"role": "assistant", "content": word}, "done": False} for word in "ab"
            ]
            end = {"model": model, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
            if self.remaining_cuts:
                self.remaining_cuts.pop()
                return 200, "application/x-ndjson", ndjson(*frames), True
            return 200, "application/x-ndjson", ndjson(*frames, end), False
        answer = {"model": model, "message": {"role": "assistant", "content": "hi"}, "done": True, "choices": []}
        return 200, "application/json", json.dumps(answer).encode(), False

    def answer_probe(self, path: str) -> tuple[int, str, bytes, bool]:
        documents: dict[str, Any] = {"/v1/models": {"object": "list", "data": [{"id": name} for name in self.models]}}
        if self.kind is BackendKind.OLLAMA:
            documents |= {
                "/api/version": {"version": "0.12.6"},
                "/api/tags": {"models": [{"name": name, "model": name} for name in self.models]},
                "/api/ps": {"models": []},
            }
        document = documents.get(path)
        status = 404 if document is None else 200
        return status, "application/json", json.dumps(document or {"error": "no"}).encode(), False


def ndjson(*documents: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


@asynccontextmanager
async def serve(
    *models: ModelSpec, hosts: Mapping[str, StandIn], spec: GatewaySpec | None = None
) -> AsyncIterator[RunningGateway]:
    """A gateway over these hosts."""
    async with AsyncExitStack() as stack:
        nodes = []
        for name, host in hosts.items():
            server = await asyncio.start_server(host.serve, "127.0.0.1", 0)
            stack.push_async_callback(close_stand_in, server, host)
            host.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            nodes.append(node(name, host.url, kind=host.kind))
        gateway_spec = GatewaySpec(port=0) if spec is None else spec
        mesh = await stack.enter_async_context(Mesh(Topology("test", tuple(nodes), gateway_spec, models=models)))
        gateway = await stack.enter_async_context(Gateway(mesh, port=0))
        client = await stack.enter_async_context(loopback_client(base_url=gateway.url, timeout=20))
        await mesh.wait_first_report(10.0)
        yield RunningGateway(mesh, gateway, {}, client)


async def close_stand_in(server: asyncio.Server, host: StandIn) -> None:
    """Closes the server's end of each connection too: a client's end may be open until its next collection."""
    server.close()
    for writer in host.connections.values():
        writer.close()
    if host.connections:
        await asyncio.wait(host.connections, timeout=5)


def asked_models(host: StandIn) -> list[str]:
    return [body["model"] for body in host.bodies]


# -- aliases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LLAMA_8B.name, LLAMA_ON_VLLM, "Assistant", "LLAMA3.1:8B"])
async def test_each_server_gets_the_name_that_it_lists(name: str) -> None:
    ollama, vllm = StandIn(LLAMA_8B.name), StandIn(LLAMA_ON_VLLM, kind=BackendKind.OPENAI)
    async with serve(LLAMA_RULES, hosts={"a": ollama, "b": vllm}) as fleet:
        for wanted in ("a", "b"):
            answer = await fleet.client.post(
                "/v1/chat/completions", json={"model": name, **CHAT}, headers={"X-GPUMesh-Node": wanted}
            )
            assert answer.status_code == 200
            shown = None if name.lower() == LLAMA_8B.name else LLAMA_8B.name
            assert answer.headers.get("X-GPUMesh-Model") == shown
    assert asked_models(ollama) == [LLAMA_8B.name]
    assert asked_models(vllm) == [LLAMA_ON_VLLM]


async def test_a_request_moves_on_to_a_server_with_another_name() -> None:
    first, second = StandIn(LLAMA_8B.name), StandIn("assistant")
    first.fails_with = second.fails_with = 503
    async with serve(LLAMA_RULES, hosts={"a": first, "b": second}) as fleet:
        await fleet.client.post("/api/chat", json={"model": "assistant", **CHAT, "extra": [1, {"model": "x"}]})
    assert set(asked_models(first)) == {LLAMA_8B.name}
    assert set(asked_models(second)) == {"assistant"}
    assert {json.dumps(body["extra"]) for body in first.bodies + second.bodies} == {'[1, {"model": "x"}]'}


async def test_a_cut_stream_is_continued_under_the_other_name() -> None:
    hosts = {"a": StandIn(LLAMA_8B.name), "b": StandIn("assistant")}
    async with serve(LLAMA_RULES, hosts=hosts) as fleet:
        hosts["a"].remaining_cuts = hosts["b"].remaining_cuts = ["the first stream, wherever it is"]
        body = {"messages": CHAT["messages"], "model": LLAMA_ON_VLLM, "stream": True}
        await fleet.client.post("/api/chat", json=body)
    assert set(asked_models(hosts["a"])) == {LLAMA_8B.name}
    assert set(asked_models(hosts["b"])) == {"assistant"}


async def test_facts_about_a_model_under_another_name() -> None:
    host = StandIn("assistant")
    async with serve(LLAMA_RULES, hosts={"a": host}) as fleet:
        answer = await fleet.client.post("/api/show", json={"name": LLAMA_ON_VLLM})
    assert (answer.status_code, asked_models(host)) == (200, ["assistant"])


async def test_an_unload_reaches_each_server_under_its_own_name() -> None:
    hosts = {"a": StandIn(LLAMA_8B.name), "b": StandIn("assistant"), "c": StandIn(MODEL)}
    async with serve(LLAMA_RULES, hosts=hosts) as fleet:
        answer = await fleet.client.post("/api/generate", json={"model": LLAMA_ON_VLLM, "keep_alive": 0})
    assert (answer.status_code, answer.json()["model"]) == (200, LLAMA_ON_VLLM)
    assert [asked_models(host) for host in hosts.values()] == [[LLAMA_8B.name], ["assistant"], []]


async def test_a_limited_key_unloads_on_its_own_nodes() -> None:
    key = KeySpec("bob", sha256=hashlib.sha256(b"secret").hexdigest(), nodes=("b",))
    hosts = {"a": StandIn(MODEL), "b": StandIn(MODEL)}
    async with serve(hosts=hosts, spec=GatewaySpec(port=0, keys=(key,))) as fleet:
        headers = {"Authorization": "Bearer secret"}
        answer = await fleet.client.post("/api/generate", json={"model": MODEL, "keep_alive": 0}, headers=headers)
    assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "b")
    assert [asked_models(host) for host in hosts.values()] == [[], [MODEL]]


async def test_a_long_body_with_its_name_at_the_end() -> None:
    host = StandIn("assistant")
    long = "x" * (3 << 20)
    async with serve(LLAMA_RULES, hosts={"a": host}) as fleet:
        body = json.dumps({"messages": [{"role": "user", "content": long}], "stream": False, "model": LLAMA_8B.name})
        answer = await fleet.client.post("/api/chat", content=body)
        assert answer.status_code == 200
    (received,) = host.bodies
    assert received["model"] == "assistant"
    assert received["messages"][0]["content"] == long


async def test_lists_have_all_names_of_a_model() -> None:
    ollama, vllm = StandIn(LLAMA_8B.name, MODEL), StandIn(LLAMA_ON_VLLM, kind=BackendKind.OPENAI)
    async with serve(LLAMA_RULES, ModelSpec("nowhere", aliases=("neither",)), hosts={"a": ollama, "b": vllm}) as fleet:
        tags = (await fleet.client.get("/api/tags")).json()["models"]
        listed = (await fleet.client.get("/v1/models")).json()["data"]
        one = await fleet.client.get("/v1/models/assistant")
        missing = await fleet.client.get("/v1/models/neither")
    names = {LLAMA_8B.name, LLAMA_ON_VLLM, "assistant", MODEL}
    assert sorted(entry["name"] for entry in tags) == sorted(names)
    assert all(entry["name"] == entry["model"] for entry in tags)
    assert sorted(entry["id"] for entry in listed) == sorted(names)
    assert (one.status_code, one.json()["id"]) == (200, "assistant")
    assert missing.status_code == 404
    assert "not found" in missing.json()["error"]["message"]


async def test_without_rules_a_body_is_not_touched() -> None:
    host = StandIn(MODEL)
    body = b'{ "messages": [ ],\n "model" : "' + MODEL.encode() + b'", "options": {"num_ctx": 5000}, "stream": false }'
    async with serve(hosts={"a": host}) as fleet:
        answer = await fleet.client.post("/api/chat", content=body)
    assert host.raw_bodies == [body]
    assert "X-GPUMesh-Model" not in answer.headers


# -- nodes -----------------------------------------------------------------------------------------------------------


async def test_a_model_is_kept_to_its_nodes() -> None:
    hosts = {"a": StandIn(MODEL), "b": StandIn(MODEL)}
    async with serve(ModelSpec(MODEL, nodes=("b",)), hosts=hosts) as fleet:
        answers = [await fleet.chat() for _ in range(6)]
        elsewhere = await fleet.chat(headers={"X-GPUMesh-Node": "a"})
    assert {answer.headers["X-GPUMesh-Node"] for answer in answers} == {"b"}
    assert elsewhere.status_code == 503
    assert f"the rules of mesh.yaml keep '{MODEL}' away from node 'a'" in elsewhere.json()["error"]


# -- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "received"),
    [
        ({"num_ctx": 1}, {"num_ctx": 4096}),
        ({"num_ctx": 4097, "temperature": 0.5}, {"num_ctx": 16384, "temperature": 0.5}),
        ({"num_ctx": 16384}, {"num_ctx": 16384}),
        ({"num_ctx": 20000}, {"num_ctx": 20000}),
        ({"num_ctx": "many"}, {"num_ctx": "many"}),
        ({"num_ctx": 0}, {"num_ctx": 0}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({}, {}),
        (None, None),
        ([], []),
    ],
)
async def test_a_context_is_rounded_up(options: Any, received: Any) -> None:
    host = StandIn(MODEL)
    async with serve(ModelSpec(MODEL, context_steps=(4096, 16384)), hosts={"a": host}) as fleet:
        body = json.dumps({"model": MODEL, **CHAT, "options": options}).encode()
        await fleet.client.post("/api/chat", content=body)
    assert host.bodies[0]["options"] == received
    if options == received:
        assert host.raw_bodies == [body]


# -- fallbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_serves_what_no_node_can(stream: bool) -> None:
    host = StandIn(MODEL)
    rules = ModelSpec("large", fallback="middle"), ModelSpec("middle", fallback=MODEL)
    async with serve(*rules, hosts={"a": host}) as fleet:
        answer = await fleet.client.post("/api/chat", json={**CHAT, "model": "large", "stream": stream})
        assert answer.headers["X-GPUMesh-Model"] == MODEL
        assert lines(answer.text)[-1]["model"] == MODEL
        missing = await fleet.client.post("/api/chat", json={**CHAT, "model": "other"})
        assert missing.status_code == 404
    assert asked_models(host) == [MODEL]


async def test_a_fallback_serves_what_failed_at_every_node() -> None:
    first, second = StandIn("large"), StandIn(MODEL)
    first.fails_with = 503
    rules = ModelSpec("large", fallback=MODEL, context_steps=(8192,)), ModelSpec(MODEL, nodes=("b",))
    async with serve(*rules, hosts={"a": first, "b": second}) as fleet:
        answer = await fleet.client.post("/api/chat", json={**CHAT, "model": "large", "options": {"num_ctx": 100}})
        assert (answer.status_code, answer.headers["X-GPUMesh-Model"]) == (200, MODEL)
    assert first.bodies[0]["options"] == {"num_ctx": 8192}
    assert second.bodies[0]["options"] == {"num_ctx": 100}, "the steps are those of the other model"


async def test_an_error_of_the_request_itself_asks_for_no_fallback() -> None:
    host = StandIn("large", MODEL)
    host.fails_with = 400
    async with serve(ModelSpec("large", fallback=MODEL), hosts={"a": host}) as fleet:
        answer = await fleet.client.post("/api/chat", json={**CHAT, "model": "large"})
    assert (answer.status_code, asked_models(host)) == (400, ["large"])


async def test_the_reply_is_that_of_the_first_model_if_its_fallback_is_missing() -> None:
    host = StandIn("large")
    host.fails_with = 502
    async with serve(ModelSpec("large", fallback="nowhere"), hosts={"a": host}) as fleet:
        answer = await fleet.client.post("/api/chat", json={**CHAT, "model": "large"})
    assert answer.status_code == 502
    assert answer.json() == {"error": "no"}


async def test_the_error_is_that_of_the_model_that_was_asked_for() -> None:
    async with serve(ModelSpec("large", fallback="small"), hosts={"a": StandIn(MODEL)}) as fleet:
        answer = await fleet.client.post("/v1/chat/completions", json={**CHAT, "model": "large"})
    assert answer.status_code == 404
    assert "'large' not found" in answer.json()["error"]["message"]


# -- keys ------------------------------------------------------------------------------------------------------------

CHAT_KEY, NIGHT_KEY = "chat-secret", "night-secret"
BEARER_CHAT = {"Authorization": f"Bearer {CHAT_KEY}"}
BEARER_NIGHT = {"Authorization": f"Bearer {NIGHT_KEY}"}
KEYED = GatewaySpec(
    port=0,
    route_priority={"/api/embed": Priority.BATCH},
    keys=(
        KeySpec("chat", env="CHAT_KEY"),
        KeySpec(
            "night",
            sha256=hashlib.sha256(NIGHT_KEY.encode()).hexdigest(),
            priority=Priority.BATCH,
            nodes=("b",),
            models=("assistant", MODEL),
        ),
    ),
)


@asynccontextmanager
async def serve_keyed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RunningGateway, dict[str, StandIn]]]:
    monkeypatch.setenv("CHAT_KEY", CHAT_KEY)
    hosts = {"a": StandIn(MODEL, EMBEDDER.name), "b": StandIn(MODEL, LLAMA_8B.name, EMBEDDER.name)}
    async with serve(LLAMA_RULES, ModelSpec(MODEL, fallback=EMBEDDER.name), spec=KEYED, hosts=hosts) as fleet:
        yield fleet, hosts


async def test_each_key_opens_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_keyed(monkeypatch) as (fleet, hosts):
        assert (await fleet.chat()).status_code == 401
        assert (await fleet.chat(headers={"x-api-key": "wrong"})).status_code == 401
        assert (await fleet.chat(headers=BEARER_CHAT)).status_code == 200
        for _ in range(4):
            answer = await fleet.chat(headers={"x-api-key": NIGHT_KEY})
            assert answer.headers["X-GPUMesh-Node"] == "b"
        allowed = await fleet.chat(model=LLAMA_ON_VLLM, headers=BEARER_NIGHT)
        assert allowed.status_code == 200, "by any name of the model"
        assert hosts["b"].bodies[-1]["model"] == LLAMA_8B.name


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "said"),
    [
        ("POST", "/api/chat", {"model": EMBEDDER.name}, {}, "may not use model"),
        ("POST", "/v1/chat/completions", {"model": EMBEDDER.name}, {}, "may not use model"),
        ("POST", "/v1/messages", {"model": EMBEDDER.name}, {}, "may not use model"),
        ("POST", "/api/chat", {"model": MODEL}, {"X-GPUMesh-Node": "a"}, "may not use node 'a'"),
        ("POST", "/api/show", {"model": EMBEDDER.name}, {}, "may not use model"),
        ("GET", f"/v1/models/{EMBEDDER.name}", None, {}, "may not use model"),
        ("GET", f"/v1/models/{MODEL}", None, {"X-GPUMesh-Node": "a"}, "may not use node 'a'"),
        ("POST", "/api/pull", {"model": MODEL}, {}, "may not change the mesh"),
        ("DELETE", "/api/delete", {"model": MODEL}, {}, "may not change the mesh"),
        ("POST", "/api/signout", {}, {}, "may not change the mesh"),
        ("POST", "/mesh/nodes/a/drain", None, {}, "may not change the mesh"),
    ],
)
async def test_a_limited_key_gets_403(
    method: str, path: str, body: Any, headers: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_keyed(monkeypatch) as (fleet, hosts):
        answer = await fleet.client.request(method, path, json=body, headers={**BEARER_NIGHT, **headers})
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert said in (error if isinstance(error, str) else error["message"])
        if path.startswith("/v1/"):
            assert error["type"] == "permission_error"
        assert not hosts["a"].bodies + hosts["b"].bodies
        drained = await fleet.client.post("/mesh/nodes/a/drain", headers=BEARER_CHAT)
        assert drained.status_code == 200, "a key without limits may"


async def test_a_limited_key_sees_what_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_keyed(monkeypatch) as (fleet, _):
        tags = (await fleet.client.get("/api/tags", headers=BEARER_NIGHT)).json()["models"]
        assert {entry["name"] for entry in tags} == {MODEL, LLAMA_8B.name, LLAMA_ON_VLLM, "assistant"}
        everything = (await fleet.client.get("/v1/models", headers=BEARER_CHAT)).json()["data"]
        assert EMBEDDER.name in {entry["id"] for entry in everything}


async def test_a_key_gets_no_fallback_that_it_may_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_keyed(monkeypatch) as (fleet, hosts):
        for host in hosts.values():
            host.fails_with = 503
        answer = await fleet.chat(headers=BEARER_NIGHT)
        assert answer.status_code == 503
        assert set(asked_models(hosts["b"])) == {MODEL}
        await fleet.chat(headers=BEARER_CHAT)
        assert EMBEDDER.name in asked_models(hosts["a"]) + asked_models(hosts["b"])


async def test_secrets_are_not_passed_on_nor_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_keyed(monkeypatch) as (fleet, hosts):
        await fleet.chat(headers=BEARER_NIGHT)
        status = (await fleet.client.get("/mesh/status", headers=BEARER_CHAT)).text
    assert CHAT_KEY not in caplog.text + status
    assert NIGHT_KEY not in caplog.text + status + str(hosts["b"].raw_bodies)


# -- what the balancer decides on ------------------------------------------------------------------------------------


@pytest.fixture
def demands(monkeypatch: pytest.MonkeyPatch) -> list[Demand]:
    """The demands that reach the mesh, except those of probes and lists."""
    seen: list[Demand] = []
    send = Mesh.send

    def record(mesh: Mesh, demand: Demand, *args: Any, **more: Any) -> Any:
        seen.append(demand)
        return send(mesh, demand, *args, **more)

    monkeypatch.setattr(Mesh, "send", record)
    return seen


async def test_a_demand_says_what_is_loaded_for_whom_and_by_which_route(demands: list[Demand]) -> None:
    rules = ModelSpec(MODEL, context_steps=(8192,), aliases=("assistant",), prefer=("b",))
    async with serve(rules, hosts={"a": StandIn(MODEL), "b": StandIn(MODEL)}) as fleet:
        body = {"model": "assistant", **CHAT, "options": {"num_ctx": 100, "num_gpu": 5}}
        await fleet.client.post("/api/chat", json=body, headers={"X-GPUMesh-Client": "app"})
        await fleet.client.post("/v1/chat/completions", json={"model": MODEL, **CHAT})
    named, plain = demands
    assert named.model == MODEL
    assert named.residency == ResidencyKey(MODEL, 8192, (("num_gpu", 5),))
    assert (named.client, named.route, named.preferred_nodes) == ("app", "/api/chat", frozenset({"b"}))
    assert plain.residency == ResidencyKey(MODEL)
    assert (plain.client, plain.route, plain.priority) == ("127.0.0.1", "/v1/chat/completions", Priority.NORMAL)


async def test_the_class_comes_from_the_header_then_the_key_then_the_route(
    demands: list[Demand], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_keyed(monkeypatch) as (fleet, _):
        embed = {"model": MODEL, "input": "x"}
        await fleet.client.post("/api/embed", json=embed, headers=BEARER_CHAT)
        await fleet.client.post("/api/embed", json=embed, headers=BEARER_CHAT | {"X-GPUMesh-Priority": "interactive"})
        await fleet.chat(headers=BEARER_CHAT)
        await fleet.chat(headers=BEARER_NIGHT)
        await fleet.chat(headers=BEARER_NIGHT | {"X-GPUMesh-Client": "chat"})
    classes = [Priority.BATCH, Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH, Priority.BATCH]
    assert [demand.priority for demand in demands] == classes
    assert [demand.client for demand in demands] == ["chat", "chat", "chat", "night", "night"]


async def test_a_request_at_which_two_servers_fail_goes_to_no_fallback() -> None:
    """The servers of the fallback could fail at it as well."""
    hosts = {"a": StandIn("large"), "b": StandIn("large"), "c": StandIn("small")}
    for name in "ab":
        hosts[name].ends_connections = True
    async with serve(ModelSpec("large", fallback="small"), hosts=hosts) as fleet:
        response = await fleet.client.post("/api/chat", json={"model": "large", **CHAT})
        assert (response.status_code, response.headers["X-Should-Retry"]) == (503, "false")
        assert "two servers failed at this request" in response.json()["error"]
        with pytest.raises(ServersFailed):
            async with fleet.mesh.chat("large", "hello"):
                pass
    assert [len(host.raw_bodies) for host in hosts.values()] == [2, 2, 0]


# -- chats of the library and of `gpumesh run` -----------------------------------------------------------------------


async def test_a_chat_keeps_to_the_rules_too(demands: list[Demand]) -> None:
    host = StandIn("assistant")
    rules = (
        ModelSpec(LLAMA_8B.name, aliases=("assistant", "llama"), context_steps=(4096,)),
        ModelSpec("large", fallback="llama"),
    )
    async with serve(*rules, hosts={"a": host}) as fleet:
        assert await fleet.mesh.wait_usable("large", timeout_s=5.0) == "a"
        request = ChatRequest("large", (Message("user", "hi"),), {"num_ctx": 10})
        async with fleet.mesh.chat(request) as stream:
            text = "".join([chunk.text async for chunk in stream])
        with pytest.raises(ModelMissing):
            await fleet.mesh.wait_usable("nowhere", timeout_s=5.0)
    assert text == "ab"
    (body,) = host.bodies
    assert (body["model"], body["options"]["num_ctx"]) == ("assistant", 4096)
    assert demands[-1].residency == ResidencyKey(LLAMA_8B.name, 4096)
