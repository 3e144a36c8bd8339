"""The hot path as clients see it: one seamless answer, whatever happens to nodes or clients."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.proxy import read_resume
from gpumesh.lab.profile import QWEN_7B, Faults, HostProfile
from gpumesh.mesh.requests import silence_watch
from gpumesh.topology import NodeSpec
from tests.gateway.fleet import MODEL, RunningGateway, events, lines, node, quick_host, serve_hosts, serve_nodes
from tests.mesh.meshes import ollama_script
from tests.mesh.servers import Exchange, chunk, chunked_head, serve
from tests.tunnels.polling import wait_until

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Wie groß? 日本"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": MODEL, "prompt": "Wie groß?"},
    "/v1/chat/completions": {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
}
FAULTS = {
    "reset": Faults(cut_after_tokens=9),
    "silent end": Faults(end_after_tokens=9),
    "error line": Faults(error_line_after_tokens=9),
    "stall": Faults(stall_after_tokens=9),
}


def host(name: str, *, continues: bool = True, **changes: Any) -> HostProfile:
    model = replace(QWEN_7B, continues=continues, resident=True)
    return quick_host(name, models=(model,), **{"slots": 16, "answer_tokens": (40, 40), **changes})


@asynccontextmanager
async def preferring_a(*, continues: bool = True, **changes: Any) -> AsyncIterator[RunningGateway]:
    """A gateway over ``a`` and ``b``, of which ``a`` is asked first."""
    async with serve_hosts(host("a", continues=continues, **changes), host("b", continues=continues)) as fleet:
        nodes: list[NodeSpec] = []
        for name, weight in (("a", 1.0), ("b", 0.01)):
            nodes.append(replace(node(name, fleet.hosts[name].url, max_parallel=16), weight=weight))
        async with serve_nodes(tuple(nodes), fleet.hosts) as made:
            yield made


def read(path: str, response: httpx.Response) -> str:
    """The text of a whole, error-free stream with one final frame."""
    if path.startswith("/v1"):
        *documents, last = events(response.text)
        assert last == "[DONE]"
        assert not any("error" in document or document == "[DONE]" for document in documents)
        return "".join(one["choices"][0]["delta"].get("content", "") for one in documents if one["choices"])
    *pieces, last = lines(response.text)
    assert last["done"] is True
    assert not any(piece["done"] for piece in pieces)
    return "".join(piece["message"]["content"] if "message" in piece else piece["response"] for piece in pieces)


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] if name == "stall" else []) for name in FAULTS]
)
async def test_a_client_sees_one_seamless_answer(fault: str, continues: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stall":
        monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 3.0)  # longer than a busy machine may delay a token
        monkeypatch.setattr(silence_watch, "PAUSE_FACTOR", 1.0)
    async with preferring_a(continues=continues) as fleet:
        for path, body in BODIES.items():
            want = read(path, await fleet.client.post(path, json=body))
            await fleet.hosts["a"].set_faults(FAULTS[fault])
            response = await fleet.client.post(path, json=body)
            await fleet.hosts["a"].set_faults(Faults())
            assert response.status_code == 200
            assert response.headers["X-GPUMesh-Node"] == "a"  # the node that began: the head was sent before the cut
            assert read(path, response) == want
            assert '"gpumesh":{"continued":1,"tokens_before":9}' in response.text
        counters = fleet.mesh.request_counters
        assert (counters.accepted, counters.served, counters.failed, counters.cancelled) == (6, 6, 0, 0)
        await wait_until(lambda: fleet.count_running() == 0, "no host works on")


async def test_many_streams_that_are_cut_at_once_are_all_completed() -> None:
    async with preferring_a(tokens_per_s=200.0) as fleet:
        path = "/api/chat"
        bodies = [{**CHAT, "options": {"seed": seed}} for seed in range(16)]
        want = [read(path, await fleet.client.post(path, json=body)) for body in bodies[:4]]
        asking = [asyncio.create_task(fleet.client.post(path, json=body)) for body in bodies]
        await wait_until(lambda: fleet.hosts["a"].counters.tokens > 300, "the streams run")
        await fleet.hosts["a"].set_faults(Faults(refuse=True))
        texts = [read(path, response) for response in await asyncio.gather(*asking)]
        assert texts[:4] == want
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("path", BODIES)
async def test_without_resume_a_cut_answer_ends_with_an_error_in_the_clients_api(path: str) -> None:
    async with preferring_a() as fleet:
        await fleet.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        response = await fleet.client.post(path, json=BODIES[path], headers={"x-gpumesh-resume": "off"})
        assert response.status_code == 200
        if path.startswith("/v1"):
            *_, last = events(response.text)
            words, kind = last["error"]["message"], last["error"]["type"]
            assert kind == "api_error"
            assert "[DONE]" not in response.text
        else:
            *pieces, last = lines(response.text)
            words = last["error"]
            assert [piece["done"] for piece in pieces] == [False] * 3
        assert "asked for no continuation" in words
        assert fleet.mesh.request_counters.failed == 1


@pytest.mark.parametrize(
    ("path", "more"),
    [("/v1/completions", {"prompt": "x"}), ("/v1/messages", {"max_tokens": 50}), ("/v1/responses", {"input": "x"})],
)
async def test_streams_that_cannot_be_continued_end_with_their_own_error(path: str, more: dict[str, Any]) -> None:
    async with preferring_a() as fleet:
        await fleet.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        response = await fleet.client.post(path, json={**CHAT, "stream": True, **more})
        last = events(response.text)[-1]
        words = last["message"] if path == "/v1/responses" else last["error"]["message"]
        assert "cannot be continued" in words
        assert ("event: error\n" in response.text) == (path != "/v1/completions")


async def test_a_deadline_in_mid_answer_is_an_error_in_the_clients_api() -> None:
    async with preferring_a(tokens_per_s=20.0) as fleet:
        response = await fleet.client.post("/api/chat", json=CHAT, headers={"x-gpumesh-timeout": "0.3"})
        assert response.status_code == 200
        assert "deadline" in lines(response.text)[-1]["error"]


@pytest.mark.parametrize(("asked", "allowed"), [(None, True), ("on", True), (" OFF ", False), ("off", False)])
def test_the_resume_header_is_read(asked: str | None, allowed: bool) -> None:
    assert read_resume({} if asked is None else {"x-gpumesh-resume": asked}) is allowed


async def test_a_resume_that_is_neither_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(BadRequest, match="on or off"):
        read_resume({"x-gpumesh-resume": "maybe"})
    async with preferring_a() as fleet:
        response = await fleet.client.post("/api/chat", json=CHAT, headers={"x-gpumesh-resume": "maybe"})
        assert response.status_code == 400
        assert fleet.hosts["a"].counters.started == 0


# -- clients ---------------------------------------------------------------------------------------------------------


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


@pytest.mark.parametrize("moment", ["reading the prompt", "in the queue", "in mid-answer"])
async def test_a_client_that_leaves_stops_the_generation(moment: str) -> None:
    slow: dict[str, Any] = {"prefill_tokens_per_s": 0.5} if moment == "reading the prompt" else {"tokens_per_s": 20.0}
    async with serve_hosts(host("a", **slow), max_parallel=1) as fleet:
        a = fleet.hosts["a"]
        first = None
        if moment == "in the queue":
            first = asyncio.create_task(fleet.client.post("/api/chat", json=CHAT))
            await wait_until(lambda: a.counters.running == 1, "the slot is taken")
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        writer.write(request("/api/chat", CHAT))
        if moment == "in mid-answer":
            await reader.readuntil(b'"done":false')
        elif first is None:
            await wait_until(lambda: a.counters.running == 1, "it is with the host")
        else:
            await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "it waits")
        writer.transport.abort()
        left = time.monotonic()
        if first is None:
            await wait_until(lambda: a.counters.cancelled == 1 and a.counters.running == 0, "the host stops")
        else:
            await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 0, "it left the queue")
            assert a.counters.started == 1
        assert time.monotonic() - left < 5.0  # benchmarks have the true figure: this machine may be busy
        await wait_until(lambda: fleet.mesh.request_counters.cancelled == 1, "it is counted as cancelled")
        if first is not None:
            assert (await first).status_code == 200
        counters = fleet.mesh.request_counters
        assert counters.accepted == counters.served + counters.failed + counters.cancelled


async def test_a_client_that_leaves_while_its_answer_is_continued() -> None:
    async with preferring_a() as fleet:
        await fleet.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        await fleet.hosts["b"].set_faults(Faults(hang=True, paths=("/api/chat",)))
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        writer.write(request("/api/chat", CHAT))
        await reader.readuntil(b'"done":false')
        await wait_until(lambda: fleet.mesh.snapshot().nodes[1].load.in_flight == 1, "b was asked to continue")
        writer.transport.abort()
        await wait_until(lambda: fleet.mesh.snapshot().nodes[1].load.in_flight == 0, "b's slot is free again")
        await wait_until(lambda: fleet.mesh.request_counters.cancelled == 1, "it is counted as cancelled")


@pytest.mark.slow
async def test_a_slow_reader_does_not_fill_memory() -> None:
    sent = 0
    line = json.dumps({"message": {"content": "x" * 60_000}, "done": False}).encode() + b"\n"

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send(chunked_head())
        for _ in range(4000):
            await exchange.send(chunk(line))
            sent += len(line)

    async with serve(ollama_script(flood)) as server, serve_nodes((node("a", server.url),)) as fleet:
        with socket.create_connection(("127.0.0.1", fleet.port)) as client:
            client.sendall(request("/api/chat", {**CHAT, "model": "m"}))
            seen = -1
            await wait_until(lambda: sent > 0, "it has begun")
            while sent != seen:  # until nothing more is sent
                seen = sent
                await asyncio.sleep(0.3)
            assert sent < 48 << 20  # of 240 MB: what the kernel's buffers of two connections take
        await wait_until(lambda: fleet.mesh.request_counters.cancelled == 1, "its leaving is noticed")
