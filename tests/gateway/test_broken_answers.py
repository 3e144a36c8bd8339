"""Answers with status 200 that are not whole, or tell of a failure: the client gets another node's answer."""

from __future__ import annotations

import json

import pytest

from gpumesh.balancer.outcomes import Outcome
from tests.gateway.test_foreign_answers import ask, serve_fleet
from tests.mesh.servers import Exchange, whole_response

ABORTED = json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}], "usage": {"x": 1}}).encode()
LINES = b'{"message":{"content":"a"},"done":false}\n' * 3
OLD_ERROR = b'{"object":"error","message":"CUDA error","code":500}'
BROKEN: dict[str, tuple[bytes, Outcome]] = {
    "an object that is cut": (whole_response(b'{"message":{"content":"y"'), Outcome.CUT),
    "lines without an end": (whole_response(LINES), Outcome.CUT),
    "given up": (whole_response(ABORTED), Outcome.SERVER_ERROR),
    "an error of vLLM": (whole_response(OLD_ERROR), Outcome.SERVER_ERROR),
    "null": (whole_response(b"null"), Outcome.SERVER_ERROR),
    "nothing in it": (whole_response(b"{}"), Outcome.SERVER_ERROR),
    "partial": (whole_response(b'{"message":{"content":"y"},"done":true}', status="206 Partial"), Outcome.SERVER_ERROR),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_another_node_is_asked(what: str) -> None:
    answer, outcome = BROKEN[what]
    async with serve_fleet(answer, None) as running:
        response = await ask(running, "/api/chat")
        assert (response.status_code, response.headers["X-GPUMesh-Node"]) == (200, "b")
        assert running.mesh.attempt_outcomes["a"] == {outcome: 1}


@pytest.mark.parametrize("path", ["/api/chat", "/api/embed"])
async def test_the_end_of_the_connection_may_be_a_cut(path: str) -> None:
    """HTTP/1.0, and servers that announce no length: then only the JSON shows what is missing."""

    async def cut(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
        await exchange.send(b'{"message":{"content":"y"},"embeddings":[[0.1,0.2]')
        exchange.close()

    async def whole(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
        await exchange.send(b'{"message":{"content":"y"},"embeddings":[[0.1,0.2]]}')
        exchange.close()

    async with serve_fleet(cut, whole) as running:
        response = await ask(running, path)
        assert (response.status_code, response.headers["X-GPUMesh-Node"]) == (200, "b")
        assert response.json()["embeddings"] == [[0.1, 0.2]]
        assert running.mesh.attempt_outcomes["a"] == {Outcome.CUT: 1}
