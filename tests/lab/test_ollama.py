"""The stand-in for Ollama as a client sees it (``docs/internals/ollama.md``), over real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, QWEN3_8B, QWEN_7B, Faults, ModelProfile
from tests.http_clients import loopback_client
from tests.tunnels.polling import wait_until

CHATML = ModelProfile("chatml:7b", continues=False)
HOST = profile.make_instant_host("one", models=(QWEN_7B, QWEN3_8B, EMBEDDER, CHATML))
ASK = {"model": "qwen2.5:7b", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def server() -> AsyncIterator[SimOllama]:
    async with SimOllama(HOST) as standin:
        yield standin


@pytest.fixture
async def http(server: SimOllama) -> AsyncIterator[httpx.AsyncClient]:
    async with loopback_client(base_url=server.url, timeout=20) as client:
        yield client


def frames(response: httpx.Response) -> list[Any]:
    return [json.loads(line) for line in response.text.splitlines()]


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


async def test_the_fleet_routes(http: httpx.AsyncClient) -> None:
    assert (await http.get("/")).text == "Ollama is running"
    assert (await http.head("/")).status_code == 200
    assert (await http.get("/api/version")).json() == {"version": "0.12.6-lab"}
    tags = (await http.get("/api/tags")).json()["models"]
    assert {entry["name"] for entry in tags} == {model.name for model in HOST.models}
    assert len({entry["modified_at"] for entry in tags}) == len(tags)
    assert (await http.get("/api/ps")).json() == {"models": []}
    assert {entry["id"] for entry in (await http.get("/v1/models")).json()["data"]} == {m.name for m in HOST.models}


async def test_a_chat_streams_lines_and_ends_with_the_counters(http: httpx.AsyncClient) -> None:
    response = await http.post("/api/chat", json=ASK)
    assert response.headers["content-type"] == "application/x-ndjson"
    *pieces, last = frames(response)
    assert last["done"] is True
    assert last["done_reason"] == "stop"
    assert last["eval_count"] == len(pieces)
    assert all(last[key] > 0 for key in ("total_duration", "prompt_eval_count", "eval_duration"))
    whole = (await http.post("/api/chat", json={**ASK, "stream": False})).json()
    assert whole["message"]["content"] == "".join(piece["message"]["content"] for piece in pieces)
    (loaded,) = (await http.get("/api/ps")).json()["models"]
    assert loaded["size_vram"] == loaded["size"] > 0


async def test_all_apis_say_the_same(http: httpx.AsyncClient) -> None:
    native = (await http.post("/api/chat", json={**ASK, "stream": False})).json()["message"]["content"]
    openai = (await http.post("/v1/chat/completions", json=ASK)).json()
    assert openai["choices"][0]["message"]["content"] == native
    streamed = events(await http.post("/v1/chat/completions", json={**ASK, "stream": True}))
    assert streamed[-1] == "[DONE]"
    pieces = [json.loads(one)["choices"][0]["delta"].get("content", "") for one in streamed[:-1]]
    assert "".join(pieces) == native
    anthropic = (await http.post("/v1/messages", json={**ASK, "max_tokens": 500})).json()
    assert anthropic["content"][0]["text"] == native
    responses = (await http.post("/v1/responses", json={"model": ASK["model"], "input": "Hello"})).json()
    assert responses["output"][-1]["content"][0]["text"] == native


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/chat", {"model": "none:7b", "messages": []}, 404, "model 'none:7b' not found"),
        ("/api/chat", {"messages": []}, 400, "model is required"),
        ("/api/chat", {**ASK, "think": True}, 400, "does not support thinking"),
        ("/v1/chat/completions", {**ASK, "model": "none:7b"}, 404, "none:7b"),
        ("/v1/messages", {"model": "none:7b", "messages": [], "max_tokens": 5}, 404, "none:7b"),
    ],
)
async def test_errors_in_each_apis_shape(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in (error if path.startswith("/api/") else error["message"])


async def test_what_no_route_takes(http: httpx.AsyncClient) -> None:
    assert (await http.get("/api/chat")).status_code == 405
    assert (await http.get("/api/strange")).status_code == 404
    assert (await http.post("/api/chat", content=b"{")).status_code == 400
    assert (await http.post("/api/chat", content=b"")).json()["error"] == "missing request body"


async def test_host_and_origin_are_checked_without_a_word(http: httpx.AsyncClient) -> None:
    refused = await http.get("/api/tags", headers={"Host": "example.com"})
    assert (refused.status_code, refused.content) == (403, b"")
    assert (await http.get("/api/tags", headers={"Origin": "https://example.com"})).status_code == 403
    assert (await http.get("/api/tags", headers={"Host": "gpu.local"})).status_code == 200


async def test_thinking_comes_first_and_can_be_turned_off(http: httpx.AsyncClient) -> None:
    ask = {**ASK, "model": "qwen3:8b", "stream": False}
    assert (await http.post("/api/chat", json=ask)).json()["message"]["thinking"]
    assert "thinking" not in (await http.post("/api/chat", json={**ask, "think": False})).json()["message"]


async def test_a_tool_is_called(http: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    message = (await http.post("/api/chat", json={**ASK, "tools": [tool], "stream": False})).json()["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert isinstance(call["function"]["arguments"]["city"], str)


async def test_a_rendered_prompt_is_continued_as_raw_text_even_where_the_template_closes_the_turn(
    http: httpx.AsyncClient,
) -> None:
    ask = {**ASK, "model": "chatml:7b"}
    said = (await http.post("/api/chat", json={**ask, "stream": False})).json()["message"]["content"]
    half = said[: len(said) // 2]
    rendered = await http.post("/api/chat", json={**ask, "_debug_render_only": True})
    prompt = rendered.json()["_debug_info"]["rendered_template"]
    rest = await http.post(
        "/api/generate", json={"model": "chatml:7b", "prompt": prompt + half, "raw": True, "stream": False}
    )
    assert half + rest.json()["response"] == said


async def test_embeddings_depend_on_the_text_only(http: httpx.AsyncClient) -> None:
    ask = {"model": "nomic-embed-text", "input": ["one", "two", "one"]}
    one, two, again = (await http.post("/api/embed", json=ask)).json()["embeddings"]
    assert one == again != two
    (old,) = [(await http.post("/api/embeddings", json={"model": ask["model"], "prompt": "one"})).json()["embedding"]]
    assert len(old) == len(one)
    assert len((await http.post("/v1/embeddings", json=ask)).json()["data"]) == 3


async def test_the_store_changes(http: httpx.AsyncClient) -> None:
    lines = frames(await http.post("/api/pull", json={"model": "new:1b"}))
    assert lines[-1] == {"status": "success"}
    assert (await http.post("/api/copy", json={"source": "new:1b", "destination": "other"})).status_code == 200
    assert (await http.request("DELETE", "/api/delete", json={"model": "new:1b"})).status_code == 200
    assert (await http.request("DELETE", "/api/delete", json={"model": "new:1b"})).status_code == 404
    names = [entry["name"] for entry in (await http.get("/api/tags")).json()["models"]]
    assert "new:1b" not in names
    assert "other:latest" in names


async def test_a_client_that_leaves_frees_its_slot() -> None:
    async with SimOllama(profile.make_host("slow", tokens_per_s=20.0, load_s=0.0)) as server:
        async with (
            loopback_client(base_url=server.url, timeout=20) as http,
            http.stream("POST", "/api/chat", json=ASK) as response,
        ):
            await anext(response.aiter_bytes())
            assert server.engine.running == 1
        await wait_until(lambda: server.counters.cancelled == 1, "the answer is cancelled")
        assert server.engine.running == 0


async def faulty(server: SimOllama, http: httpx.AsyncClient, faults: Faults) -> httpx.Response:
    await server.set_faults(faults)
    return await http.post("/api/chat", json=ASK)


async def test_faults_before_the_first_byte(server: SimOllama, http: httpx.AsyncClient) -> None:
    response = await faulty(server, http, Faults(status=503, times=1))
    assert (response.status_code, "server busy" in response.json()["error"]) == (503, True)
    assert (await http.post("/api/chat", json=ASK)).status_code == 200  # once only
    assert (await faulty(server, http, Faults(status=500, paths=("/api/tags",)))).status_code == 200
    with pytest.raises(httpx.TransportError):
        await faulty(server, http, Faults(disconnect=True))
    with pytest.raises(httpx.ConnectError):
        await faulty(server, http, Faults(refuse=True))
    assert (await faulty(server, http, Faults())).status_code == 200


async def test_faults_in_mid_stream(server: SimOllama, http: httpx.AsyncClient) -> None:
    ended = frames(await faulty(server, http, Faults(end_after_tokens=3)))
    assert [frame["done"] for frame in ended] == [False] * 3
    *_, last = frames(await faulty(server, http, Faults(error_line_after_tokens=3)))
    assert "unexpectedly stopped" in last["error"]
    with pytest.raises(httpx.TransportError):
        await faulty(server, http, Faults(cut_after_tokens=3))


async def test_each_request_is_counted_once(server: SimOllama, http: httpx.AsyncClient) -> None:
    await asyncio.gather(*(http.post("/api/chat", json=ASK) for _ in range(10)))
    counters = server.counters
    assert (counters.started, counters.finished, counters.in_flight) == (10, 10, 0)
    assert {entry.outcome for entry in counters.requests} == {"finished"}


async def test_the_rate_is_the_set_one_in_its_own_counters() -> None:
    async with (
        SimOllama(profile.make_host("timed", tokens_per_s=500.0, load_s=0.0)) as server,
        loopback_client(base_url=server.url, timeout=20) as http,
    ):
        last = frames(await http.post("/api/chat", json=ASK))[-1]
    assert last["eval_count"] / last["eval_duration"] * 1e9 == pytest.approx(500.0, rel=0.001)


async def test_a_stall_and_a_hang_last_as_long_as_the_fault(server: SimOllama, http: httpx.AsyncClient) -> None:
    right = (await http.post("/api/chat", json=ASK)).text.count("\n")
    for faults in (Faults(stall_after_tokens=3), Faults(hang=True, paths=("/api/chat",))):
        await server.set_faults(faults)
        asking = asyncio.create_task(http.post("/api/chat", json=ASK))
        await wait_until(lambda: server.counters.http >= 2, "it was asked")
        assert (await http.get("/api/version")).status_code == 200
        assert not asking.done()
        await server.set_faults(Faults())
        assert (await asking).text.count("\n") == right
