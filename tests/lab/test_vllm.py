"""The stand-in for vLLM as a client sees it, over real sockets: its routes, its figures and the form of its errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gpumesh.lab import profile
from gpumesh.lab.profile import Faults
from gpumesh.lab.vllm import VERSION, SimVllm
from tests.http_clients import loopback_client
from tests.tunnels.polling import wait_until

HOST = profile.make_instant_host("one", slots=2)
MODEL = HOST.models[0].name
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def server() -> AsyncIterator[SimVllm]:
    async with SimVllm(HOST) as standin:
        yield standin


@pytest.fixture
async def http(server: SimVllm) -> AsyncIterator[httpx.AsyncClient]:
    async with loopback_client(base_url=server.url, timeout=20) as client:
        yield client


def text_of(response: httpx.Response) -> str:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_it_says_what_it_is(http: httpx.AsyncClient) -> None:
    health = await http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert (await http.get("/version")).json() == {"version": VERSION}
    (card,) = (await http.get("/v1/models")).json()["data"]
    assert (card["id"], card["owned_by"], card["max_model_len"]) == (MODEL, "vllm", 32768)
    assert (await http.get("/api/version")).json() == {"detail": "Not Found"}


async def test_an_answer_is_continued_only_where_it_is_marked(http: httpx.AsyncClient) -> None:
    whole = text_of(await http.post("/v1/chat/completions", json={**ASK, "stream": True}))
    begun = [*ASK["messages"], {"role": "assistant", "content": whole[:40]}]
    marks = {"continue_final_message": True, "add_generation_prompt": False}
    rest = text_of(await http.post("/v1/chat/completions", json={**ASK, **marks, "messages": begun, "stream": True}))
    assert whole[:40] + rest == whole
    anew = text_of(await http.post("/v1/chat/completions", json={**ASK, "messages": begun, "stream": True}))
    assert anew != rest
    both = await http.post("/v1/chat/completions", json={**ASK, "continue_final_message": True})
    assert both.status_code == 400
    assert both.json()["error"]["type"] == "BadRequestError"


async def test_an_unknown_model_and_a_missing_key(http: httpx.AsyncClient) -> None:
    missing = await http.post("/v1/chat/completions", json={**ASK, "model": "nope"})
    assert missing.status_code == 404
    assert missing.json()["error"] == {
        "message": "The model `nope` does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    async with SimVllm(HOST, api_key="k") as guarded, loopback_client(base_url=guarded.url) as client:
        refused = await client.get("/v1/models")
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer k"})).status_code == 200


async def test_the_metrics_count_what_runs_and_what_waits() -> None:
    slow = profile.make_host("slow", slots=2, tokens_per_s=5.0)
    async with SimVllm(slow) as server, loopback_client(base_url=server.url, timeout=20) as client:
        requests = [asyncio.create_task(client.post("/v1/chat/completions", json=ASK)) for _ in range(3)]
        await wait_until(lambda: server.counters.running == 2, "two run")
        await wait_until(lambda: server.counters.in_flight == 3, "one waits")
        page = (await client.get("/metrics")).text
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
    assert f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 2.0' in page
    assert f'vllm:num_requests_waiting{{engine="0",model_name="{MODEL}"}} 1.0' in page
    assert f'vllm:kv_cache_usage_perc{{engine="0",model_name="{MODEL}"}} 1.0' in page


async def test_an_error_in_mid_stream_is_told(server: SimVllm, http: httpx.AsyncClient) -> None:
    await server.set_faults(Faults(error_line_after_tokens=3))
    lines = (await http.post("/v1/chat/completions", json={**ASK, "stream": True})).text.splitlines()
    told, done = [line for line in lines if line][-2:]
    assert json.loads(told.removeprefix("data: "))["error"]["code"] == 500
    assert done == "data: [DONE]"
