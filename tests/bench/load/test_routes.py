"""Plain HTTP to a stand-in, and to servers that do not do what they should."""

from __future__ import annotations

import json

import pytest

from gpumesh.backends.base import ChatRequest, Chunk, Message
from gpumesh.backends.dialects import DIALECTS
from gpumesh.bench.load.routes import HttpRoute
from gpumesh.errors import BackendStatus, BackendUnreachable, StreamCut
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.topology import BackendKind
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response

CHAT = ChatRequest("qwen2.5:7b", (Message("user", "Hello"),), {"num_predict": 5, "temperature": 0}, think=False)


async def asked(
    url: str,
    *,
    kind: BackendKind = BackendKind.OLLAMA,
    node: str | None = "alpha",
    gateway: bool = False,
    key: str | None = None,
    timeout_s: float = 20.0,
) -> list[Chunk]:
    async with Upstream() as upstream:
        route = HttpRoute(upstream, url, kind, through_gateway=gateway, api_key=key, timeout_s=timeout_s)
        async with route(CHAT, node) as answer:
            assert (answer.node, answer.attempts) == (node, 1)
            return [piece async for piece in answer]


@pytest.mark.parametrize("kind", DIALECTS)
async def test_an_answer_of_each_kind_of_server(kind: BackendKind) -> None:
    async with SimOllama(profile.make_instant_host()) as server:
        pieces = await asked(server.url, kind=kind)
    assert sum(bool(piece.text) for piece in pieces) == 5
    assert pieces[-1].done
    assert pieces[-1].counters is not None
    assert pieces[-1].counters.tokens == 5


async def test_a_refusal_has_the_servers_own_words() -> None:
    async with SimOllama(profile.make_instant_host(models=())) as server:
        with pytest.raises(BackendStatus, match=r"qwen2\.5:7b") as caught:
            await asked(server.url)
    assert (caught.value.status, caught.value.node) == (404, "alpha")


async def test_an_answer_that_stops_short() -> None:
    async with SimOllama(profile.make_instant_host()) as server:
        await server.set_faults(Faults(cut_after_tokens=2))
        with pytest.raises(StreamCut):
            await asked(server.url)


async def test_a_stream_that_ends_without_its_last_frame() -> None:
    async def script(exchange: Exchange) -> None:
        line = json.dumps({"message": {"content": "half"}, "done": False}).encode() + b"\n"
        await exchange.send(chunked_head() + chunk(line) + chunk(b""))

    async with serve(script) as server:
        with pytest.raises(StreamCut):
            await asked(server.url)


async def test_nobody_and_silence() -> None:
    with pytest.raises(BackendUnreachable) as caught:
        await asked("http://127.0.0.1:1")
    assert caught.value.node == "alpha"

    async def say_nothing(exchange: Exchange) -> None:
        await exchange.wait_client_gone()

    async with serve(say_nothing) as server:
        with pytest.raises(BackendUnreachable, match="no answer"):
            await asked(server.url, timeout_s=0.2)


async def test_a_redirect_is_not_followed() -> None:
    async def elsewhere(exchange: Exchange) -> None:
        await exchange.send(whole_response(b"", status="307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/"))

    async with serve(elsewhere) as server:
        with pytest.raises(BackendStatus):
            await asked(server.url)


async def test_what_the_gateway_is_told() -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"error": "no"}', status="400 Bad Request"))

    async def heads(*, gateway: bool, node: str | None) -> str:
        async with serve(refuse) as server:
            with pytest.raises(BackendStatus):
                await asked(server.url, gateway=gateway, node=node, key="planted")
            return server.requests[0].head.decode().lower()

    told = await heads(gateway=True, node="alpha")
    assert "x-gpumesh-node: alpha" in told
    assert "authorization: bearer planted" in told
    assert "x-gpumesh-node" not in await heads(gateway=True, node=None)
    assert "x-gpumesh-node" not in await heads(gateway=False, node="alpha"), "a server need not know of nodes"
