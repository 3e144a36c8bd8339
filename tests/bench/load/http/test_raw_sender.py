"""Requests over HTTP whose answers are kept as they arrive, and parsed later: at stand-ins and scripted servers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.bench.load.http import raw_answers
from gpumesh.bench.load.http.client_apis import ClientApi, common_api
from gpumesh.bench.load.http.raw_answers import decode_answer, undecoded_sample
from gpumesh.bench.load.http.raw_sender import Endpoint, RawSender
from gpumesh.bench.load.load_sources import gateway_endpoints, node_endpoints
from gpumesh.bench.load.routes import ApiKeys
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.url_target import UrlTarget
from gpumesh.errors import BackendStatus, BackendUnreachable, StreamCut, UsageError
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests.connections.connection_pool import ConnectionPool
from tests.mesh.servers import Exchange, ScriptedServer, chunk, chunked_head, serve, whole_response

CHAT = ChatRequest("qwen2.5:7b", (Message("user", "Hello"),), {"num_predict": 5, "temperature": 0}, think=False)
FINAL = (
    b'{"message": {"content": ""}, "done": true, "done_reason": "stop", "eval_count": 2, "total_duration": 5000000}\n'
)


def frame(content: str) -> bytes:
    return json.dumps({"message": {"content": content}, "done": False}).encode() + b"\n"


async def sampled(
    *endpoints: Endpoint, node: str | None = None, timeout_s: float = 20.0, count: int = 1
) -> list[LoadSample]:
    """What comes of requests, one after another."""
    pool = ConnectionPool(asyncio.get_running_loop())
    try:
        sender = RawSender(pool, endpoints, timeout_s=timeout_s)
        request = sender.prepare(CHAT, node, None)
        answers = [await sender.send(request, index, None) for index in range(count)]
    finally:
        pool.close()
        await asyncio.sleep(0)
    return [decode_answer(answer, "mesh", answers[0].sent_s) for answer in answers]


async def one(url: str, api: ClientApi = ClientApi.OLLAMA, **options: Any) -> LoadSample:
    (sample,) = await sampled(Endpoint(url, api, "alpha"), **options)
    return sample


@pytest.mark.parametrize("api", ClientApi)
async def test_an_answer_in_each_api(api: ClientApi) -> None:
    async with SimOllama(profile.make_instant_host()) as server:
        sample = await one(server.url, api)
    assert (sample.outcome, sample.error, sample.node) == (SampleOutcome.SERVED, None, "alpha")
    assert (len(sample.arrivals_s), sample.tokens) == (5, 5)
    assert sample.prompt_tokens is not None
    assert sample.done_reason is not None
    assert 0.0 == sample.sent_s < sample.arrivals_s[0] <= sample.arrivals_s[-1] <= sample.ended_s


async def test_a_piece_arrives_with_the_read_that_completes_it() -> None:
    released = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        second = frame("second")
        await exchange.send(chunked_head() + chunk(frame("first") + second[:7]))
        await released.wait()
        await exchange.send(chunk(second[7:] + FINAL) + chunk(b""))

    async with serve(script) as server:
        task = asyncio.create_task(one(server.url))
        await asyncio.sleep(0.05)
        released.set()
        sample = await task
    first_s, second_s = sample.arrivals_s
    assert second_s - first_s > 0.03
    assert sample.tokens == 2
    assert sample.counters is not None


async def test_the_gateway_says_who_has_answered() -> None:
    head = chunked_head().removesuffix(b"\r\n") + b"X-GPUMesh-Node: oslo\r\nx-gpumesh-attempts: 3\r\n\r\n"

    async def script(exchange: Exchange) -> None:
        await exchange.send(head + chunk(frame("a") + FINAL) + chunk(b""))

    async with serve(script) as server:
        gateway = Endpoint(server.url, ClientApi.OLLAMA, through_gateway=True)
        pinned = Endpoint(server.url, ClientApi.OLLAMA, "oslo", through_gateway=True)
        (sample,) = await sampled(gateway, pinned)
        assert (sample.node, sample.attempts) == ("oslo", 3)
        assert b"x-gpumesh-node" not in server.requests[0].head.lower()
        await sampled(gateway, pinned, node="oslo")
        assert b"X-GPUMesh-Node: oslo\r\n" in server.requests[1].head


@pytest.mark.parametrize(
    ("api", "header"),
    [(ClientApi.OPENAI, b"Authorization: Bearer planted\r\n"), (ClientApi.ANTHROPIC, b"x-api-key: planted\r\n")],
)
async def test_the_key_is_sent_as_the_api_wants_it(api: ClientApi, header: bytes) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"error": {"message": "no credit"}}', status="402 Payment Required"))

    async with serve(refuse) as server:
        endpoint = Endpoint(server.url, api, api_key="planted")
        assert "planted" not in repr(endpoint)
        (sample,) = await sampled(endpoint)
        assert header in server.requests[0].head
    assert (sample.outcome, sample.error_code, sample.error) == (SampleOutcome.FAILED, BackendStatus.code, "no credit")
    assert (sample.tokens, sample.attempts) == (None, 0), "what nobody has counted is unknown"


async def test_answers_that_do_not_end_well() -> None:
    async with SimOllama(profile.make_instant_host()) as server:
        for faults in (Faults(cut_after_tokens=2), Faults(end_after_tokens=2)):
            await server.set_faults(faults)
            sample = await one(server.url)
            assert (sample.outcome, sample.error_code) == (SampleOutcome.CUT, StreamCut.code)
            assert len(sample.arrivals_s) == 2
        await server.set_faults(Faults(error_line_after_tokens=2))
        broken = await one(server.url)
        assert (broken.outcome, len(broken.arrivals_s)) == (SampleOutcome.CUT, 2)
        await server.set_faults(Faults(stall_after_tokens=2))
        stalled = await one(server.url, timeout_s=0.2)
        assert (stalled.outcome, len(stalled.arrivals_s)) == (SampleOutcome.CUT, 2)
        assert "no answer within 0.2 s" in (stalled.error or "")
        await server.set_faults(Faults())
    nobody = await one("http://127.0.0.1:1")
    assert (nobody.outcome, nobody.error_code, nobody.node) == (
        SampleOutcome.FAILED,
        BackendUnreachable.code,
        "alpha",
    )


async def test_an_idle_connection_that_was_closed_is_made_anew() -> None:
    """A server may close a connection at any time: nothing has failed, and the request is sent again."""

    async def answer_once(exchange: Exchange) -> None:
        if exchange.number == 1:
            await exchange.send(chunked_head() + chunk(frame("a") + FINAL) + chunk(b""))
        else:
            exchange.reset()

    async with serve(answer_once) as server:
        samples = await sampled(Endpoint(server.url, ClientApi.OLLAMA), count=3)
        assert [sample.outcome for sample in samples] == [SampleOutcome.SERVED] * 3
        assert server.connections == 3


async def test_an_answer_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_answers, "MAX_ANSWER_BYTES", 1000)

    async def never_end(exchange: Exchange) -> None:
        await exchange.send(chunked_head())
        while True:
            await exchange.send(chunk(frame("more")))

    async with serve(never_end) as server:
        sample = await one(server.url)
    assert sample.outcome is SampleOutcome.CUT
    assert "longer than" in (sample.error or "")


async def test_nodes_get_what_the_least_busy_one_can_take() -> None:
    """Past the balancer, the load generator spreads the requests itself."""
    gate = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.send(chunked_head() + chunk(FINAL) + chunk(b""))

    def count(server: ScriptedServer) -> int:
        return len(server.requests)

    pool = ConnectionPool(asyncio.get_running_loop())
    async with serve(hold) as first, serve(hold) as second:
        endpoints = [Endpoint(server.url, ClientApi.OLLAMA, name) for name, server in (("a", first), ("b", second))]
        sender = RawSender(pool, endpoints, timeout_s=20.0)
        anywhere, to_b = sender.prepare(CHAT, None, None), sender.prepare(CHAT, "b", None)
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate([to_b, to_b, anywhere, anywhere, anywhere, anywhere]):
                group.create_task(sender.send(request, index, None))
            async with asyncio.timeout(20):
                while count(first) + count(second) < 6:
                    await asyncio.sleep(0.005)
            gate.set()
        assert (count(first), count(second)) == (3, 3)
    pool.close()


async def test_what_a_person_sees_before_an_answer_is_parsed() -> None:
    async with SimOllama(profile.make_instant_host()) as server:
        pool = ConnectionPool(asyncio.get_running_loop())
        sender = RawSender(pool, [Endpoint(server.url, ClientApi.OLLAMA)], timeout_s=20.0)
        answer = await sender.send(sender.prepare(CHAT, None, None), 7, None)
        pool.close()
    sample = undecoded_sample(answer, "mesh", answer.sent_s)
    assert (sample.index, sample.outcome, sample.arrivals_s) == (7, SampleOutcome.SERVED, ())


async def test_where_a_stage_is_sent() -> None:
    state = await UrlTarget("http://127.0.0.1:1/v1/", ClientApi.LLAMACPP).status()
    (node,) = state.nodes
    assert (node.name, node.backend.url) == ("127.0.0.1:1", "http://127.0.0.1:1")
    common, pinned = gateway_endpoints([node], "unix:/run/my mesh.sock", "planted")
    assert (common.url, common.api, common.node) == ("http://unix:/run/my%20mesh.sock:", ClientApi.LLAMACPP, None)
    assert (pinned.node, pinned.through_gateway, pinned.api_key) == ("127.0.0.1:1", True, "planted")
    (direct,) = node_endpoints([node], ApiKeys(nodes={"127.0.0.1:1": "own"}))
    assert (direct.url, direct.through_gateway, direct.api_key) == ("http://127.0.0.1:1", False, "own")
    with pytest.raises(UsageError, match="no gateway"):
        gateway_endpoints([node], None, None)
    assert common_api(frozenset({"ollama"})) is ClientApi.OLLAMA
    assert common_api(frozenset({"ollama", "vllm"})) is ClientApi.OPENAI
    assert common_api(frozenset({"auto"})) is ClientApi.OPENAI


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://", "http://h:port", "http://me:secret@h"])
def test_urls_that_name_no_server(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        UrlTarget(url, ClientApi.OPENAI)
    assert "secret" not in caught.value.message
