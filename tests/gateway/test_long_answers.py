"""Answers that are longer than is held or read here: they are passed on, or the bound is named. No node is at fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from gpumesh.backends.frames import LINE_LIMIT
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.outcomes import Outcome
from gpumesh.mesh.requests import answer_reading
from tests.gateway.fleet import RunningGateway, metric, node, serve_nodes
from tests.mesh.meshes import MODEL, ollama_script
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve, whole_response

MIB = 1 << 20
EMBED = {"model": MODEL, "input": "?"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "?"}]}


@asynccontextmanager
async def serve_pair(answer: Callable[[Exchange], Awaitable[None]]) -> AsyncIterator[RunningGateway]:
    """A gateway over two servers that answer alike."""
    async with serve(ollama_script(answer)) as first, serve(ollama_script(answer)) as second:
        nodes = (node("a", first.url, max_parallel=8), node("b", second.url, max_parallel=8))
        async with serve_nodes(nodes) as running:
            yield running


def breakers(running: RunningGateway) -> set[Breaker]:
    return {one.ledger.breaker for one in running.mesh.fleet}


def outcomes(running: RunningGateway) -> dict[Outcome, int]:
    counts: dict[Outcome, int] = {}
    for counter in running.mesh.attempt_outcomes.values():
        for outcome, count in counter.items():
            counts[outcome] = counts.get(outcome, 0) + count
    return counts


async def test_an_embedding_of_40_mib_in_chunks_is_passed_on() -> None:
    piece = b"0.125," * (MIB // 6)
    expected = b'{"embeddings":[[' + piece * 40 + b"1]]}"
    assert len(expected) > answer_reading.HELD_BYTES

    async def answer(exchange: Exchange) -> None:
        await exchange.send(chunked_head("application/json") + chunk(b'{"embeddings":[['))
        for _ in range(40):
            await exchange.send(chunk(piece))
        await exchange.send(chunk(b"1]]}") + LAST_CHUNK)

    async with serve_pair(answer) as running:
        response = await running.client.post("/api/embed", json=EMBED)
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "1")
        assert response.content == expected
        assert breakers(running) == {Breaker()}
        assert outcomes(running) == {Outcome.SERVED: 1}


async def test_a_long_answer_that_stops_short_ends_with_a_cut_and_not_with_an_error_in_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answer_reading, "HELD_BYTES", 1000)

    async def answer(exchange: Exchange) -> None:
        await exchange.send(chunked_head("application/json") + chunk(b"[" * 2000))
        exchange.close()

    async with serve_pair(answer) as running:
        async with running.client.stream("POST", "/api/embed", json=EMBED) as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == b"[" * 2000
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(pieces)
        text = (await running.client.get("/metrics")).text
        assert metric(text, "gpumesh_requests_total", route="/api/embed", outcome="failed") == 1


async def test_a_missed_probe_does_not_move_an_answer_that_the_client_reads_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answer_reading, "HELD_BYTES", 1000)
    go_on = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.send(chunked_head("application/json") + chunk(b"[" * 2000))
        await go_on.wait()
        await exchange.send(chunk(b"]") + LAST_CHUNK)

    async with serve_pair(answer) as running, running.client.stream("POST", "/api/embed", json=EMBED) as response:
        pieces = response.aiter_raw()
        received = await anext(pieces)
        running.mesh.fleet[response.headers["X-GPUMesh-Node"]].ledger.abort_movable_attempts()
        go_on.set()
        async for piece in pieces:
            received += piece
        assert received == b"[" * 2000 + b"]"


@pytest.mark.parametrize(("status", "attempts"), [(400, "1"), (503, "2")])
async def test_an_error_that_is_too_long_names_the_bound(status: int, attempts: str) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"error":"' + b"x" * MIB + b'"}', status=f"{status} No"))

    async with serve_pair(answer) as running:
        response = await running.client.post("/v1/chat/completions", json=CHAT)
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (status, attempts)
        assert "with an error of more than 1 MiB, which is not passed on" in response.json()["error"]["message"]


async def test_a_frame_that_is_too_long_names_the_bound_and_blames_no_node() -> None:
    frame = b'{"message":{"content":"' + b"x" * (LINE_LIMIT + MIB) + b'"},"done":false}\n'

    async def answer(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(frame) + LAST_CHUNK)

    async with serve_pair(answer) as running:
        response = await running.client.post("/api/chat", json=CHAT)
        assert response.status_code == 502
        assert "a frame of more than 8 MiB, which is not passed on" in response.json()["error"]
        assert breakers(running) == {Breaker()}
        assert outcomes(running) == {Outcome.TOO_LONG: 2}
        assert [one.load.failed for one in running.mesh.snapshot().nodes] == [0, 0]
