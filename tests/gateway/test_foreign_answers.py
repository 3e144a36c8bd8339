"""Answers that no inference server gives: the request moves on, and a finding names what answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway import error_shapes
from gpumesh.gateway.model_requests import find_client_api
from gpumesh.state import Finding
from tests.gateway.fleet import RunningGateway, metric, node, serve_nodes
from tests.mesh.meshes import MODEL, ollama_script
from tests.mesh.servers import LAST_CHUNK, Exchange, chunked_head, serve, whole_response

PAGE = b"<!DOCTYPE html><html><title>Log in</title><script>alert(1)</script></html>"
MESSAGES = [{"role": "user", "content": "?"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": MESSAGES},
    "/api/embed": {"input": "?"},
    "/v1/chat/completions": {"messages": MESSAGES, "stream": True},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
# What answers, and what the finding says of it.
FOREIGN: dict[str, tuple[bytes, str]] = {
    "a page": (whole_response(PAGE, kind="text/html"), "it answered 200 with text/html"),
    "a page that calls itself JSON": (whole_response(PAGE), "it answered 200 with a web page"),
    "a redirect": (
        b"HTTP/1.1 301 Moved\r\nLocation: https://login.example/\r\nContent-Length: 0\r\n\r\n",
        "it answered 301",
    ),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", "it answered 304"),
    "nothing": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "it answered 200 with an empty body"),
    "no JSON at all": (EMPTY % (b"application/json", 2, b"\r\n"), "it answered 200 with an empty body"),
    "an empty page": (EMPTY % (b"text/html", 0, b""), "it answered 200 with an empty body"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "it answered 204 with an empty body"),
    "XML": (
        whole_response(b"<?xml version='1.0'?><a/>", kind="application/xml"),
        "it answered 200 with application/xml",
    ),
    "a proxy's time-out": (whole_response(b"", status="524 Timeout"), "it answered 524, as a proxy does"),
    "a proxy's error": (whole_response(b'{"error":"x"}', status="502 Bad"), "it answered 502, as a proxy does"),
    "a page with an error": (whole_response(PAGE, status="503 No", kind="text/html"), "it answered 503 with text/html"),
}
# The same for refusals: no node is at fault.
REFUSALS: dict[str, tuple[bytes, str]] = {
    "a login": (whole_response(PAGE, status="401 No", kind="text/html"), "it answered 401 with text/html"),
    "a firewall": (whole_response(PAGE, status="403 No", kind="text/html"), "it answered 403 with text/html"),
    "another program": (whole_response(PAGE, status="404 No", kind="text/html"), "it answered 404 with text/html"),
    "a proxy's bound": (whole_response(PAGE, status="413 No", kind="text/html"), "it answered 413 with text/html"),
}


def good_answer(path: str) -> bytes:
    if path == "/v1/chat/completions":
        event = b'data: {"choices":[{"delta":{"content":"y"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        return whole_response(event, kind="text/event-stream")
    return whole_response(b'{"message":{"content":"y"},"done":true,"content":[],"embeddings":[]}')


@asynccontextmanager
async def serve_fleet(*answers: Callable[[Exchange], Awaitable[None]] | bytes | None) -> AsyncIterator[RunningGateway]:
    """A gateway over a server for each answer, which are asked in this order; ``None``: a good answer."""

    def script(answer: Any) -> Callable[[Exchange], Awaitable[None]]:
        async def send(exchange: Exchange) -> None:
            if answer is None:
                await exchange.send(good_answer(exchange.head.split(b" ", 2)[1].decode()))
            elif isinstance(answer, bytes):
                await exchange.send(answer)
            else:
                await answer(exchange)

        return ollama_script(send)

    async with contextmanagers(*(serve(script(answer)) for answer in answers)) as servers:
        nodes = [
            replace(node(name, server.url, max_parallel=8), weight=0.001**place)
            for place, (name, server) in enumerate(zip("abc", servers, strict=False))
        ]
        async with serve_nodes(tuple(nodes)) as running:
            yield running


@asynccontextmanager
async def contextmanagers(*managers: Any) -> AsyncIterator[list[Any]]:
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(manager) for manager in managers]


async def ask(running: RunningGateway, path: str) -> httpx.Response:
    return await running.client.post(path, json={"model": MODEL, **ROUTES[path]})


def finding(running: RunningGateway, name: str = "a") -> Finding | None:
    found = [one for one in running.mesh.snapshot().findings if one.code == "answer-foreign" and one.node == name]
    return found[0] if found else None


@pytest.mark.parametrize("what", FOREIGN)
async def test_the_request_moves_on_and_a_finding_names_it(what: str) -> None:
    answer, said = FOREIGN[what]
    async with serve_fleet(answer, None) as running:
        assert finding(running) is None
        for path in ROUTES:
            running.mesh.fleet["a"].ledger.reset_breakers()
            response = await ask(running, path)
            assert (response.status_code, response.headers["X-GPUMesh-Node"]) == (200, "b"), path
            assert response.headers["X-GPUMesh-Attempts"] == "2"
            found = finding(running)
            assert found is not None
            assert f"a request got no answer of an inference server: {said}" in found.message
        assert finding(running, "b") is None
        assert running.mesh.attempt_outcomes["a"] == {Outcome.SERVER_ERROR: len(ROUTES)}
        text = (await running.client.get("/metrics")).text
        assert metric(text, "gpumesh_finding", node="a", code="answer-foreign") == 1


@pytest.mark.parametrize("what", REFUSALS)
async def test_a_refusal_of_a_proxy_is_not_the_clients_mistake(what: str) -> None:
    answer, said = REFUSALS[what]
    async with serve_fleet(answer, None) as running:
        for _ in range(4):
            response = await ask(running, "/api/chat")
            assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "2")
        assert running.mesh.attempt_outcomes["a"] == {Outcome.PROXY_REFUSED: 4}
        found = finding(running)
        assert found is not None
        assert said in found.message


@pytest.mark.parametrize("what", [*FOREIGN, *REFUSALS])
async def test_without_another_node_the_client_gets_an_error_and_nothing_of_the_body(what: str) -> None:
    answer, _ = {**FOREIGN, **REFUSALS}[what]
    async with serve_fleet(answer) as running:
        for path in ROUTES:
            running.mesh.fleet["a"].ledger.reset_breakers()
            response = await ask(running, path)
            assert response.status_code in (401, 403, 413, 502, 503, 524), "404 would say that no node has the model"
            assert error_shapes.is_error_body(find_client_api(path), response.json()), path
            assert "<" not in response.text
            assert "location" not in response.headers
        text = (await running.client.get("/metrics")).text
        assert metric(text, "gpumesh_requests_total", outcome="failed") == len(ROUTES)
        assert metric(text, "gpumesh_requests_total", outcome="served", route="/api/chat") == 0


async def test_the_finding_ends_with_the_next_request_that_is_served() -> None:
    answers = [FOREIGN["a page"][0], good_answer("/api/chat")]

    async def answer(exchange: Exchange) -> None:
        await exchange.send(answers.pop(0))

    async with serve_fleet(answer) as running:
        assert (await ask(running, "/api/chat")).status_code == 502
        assert finding(running) is not None
        assert (await ask(running, "/api/chat")).status_code == 200
        assert finding(running) is None


async def test_a_stream_that_is_empty_moves_on() -> None:
    async with serve_fleet(chunked_head("text/event-stream") + LAST_CHUNK, None) as running:
        for path in ROUTES:
            running.mesh.fleet["a"].ledger.reset_breakers()
            response = await ask(running, path)
            assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "2"), path


async def test_an_error_with_the_status_of_a_success_moves_on() -> None:
    """As routers answer whose own upstream has failed."""
    body = b'{"error":{"message":"Provider returned error","code":502}}'
    async with serve_fleet(whole_response(body), None) as running:
        for path in ("/api/chat", "/v1/messages"):
            response = await ask(running, path)
            assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "2"), path
    async with serve_fleet(whole_response(body)) as running:
        response = await ask(running, "/v1/messages")
        assert response.status_code == 500
        assert "Provider returned error" in response.text


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"r","output":[],"error":null}',
        b'{"choices":[{"message":{"content":"the \\"error\\" is"}}],"error":{"code":1}}',
        b'{"message":{"role":"assistant","content":"x"},"done":true,"error":""}',
    ],
)
async def test_an_answer_that_has_a_member_error_is_an_answer(body: bytes) -> None:
    async with serve_fleet(whole_response(body), None) as running:
        response = await ask(running, "/api/chat")
        assert (response.status_code, response.content, response.headers["X-GPUMesh-Node"]) == (200, body, "a")


async def test_the_text_of_a_recording_of_silence_is_empty() -> None:
    async with serve_fleet(whole_response(b"\n", kind="text/plain"), None) as running:
        response = await running.client.post("/v1/audio/transcriptions", json={"model": MODEL})
        assert (response.status_code, response.content, response.headers["X-GPUMesh-Node"]) == (200, b"\n", "a")
