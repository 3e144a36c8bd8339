"""A batch's requests through the gateway of the same process: with the rights, quotas and accounts of their owner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gpumesh.batches.values import COMMAND_LINE, PROMPT_ENDPOINT, BatchRequest, Reply
from gpumesh.errors import (
    BackendStatus,
    BatchOwnerUnknown,
    DeadlineExceeded,
    ModelMissing,
    NoNodeError,
    StreamCut,
    UsageError,
)
from gpumesh.gateway import in_process
from gpumesh.gateway.app import Gateway
from gpumesh.gateway.batches.owners import NO_KEY
from gpumesh.gateway.http.errors import TooManyRequests
from gpumesh.gateway.usage.store import UsageStore, read_rows
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN_7B, Faults
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests import answer_reading
from gpumesh.topology import GatewaySpec, RedisSpec, RequestRate, Topology
from tests.gateway.fleet import MODEL, RunningGateway, metric, node, quick_host, serve_hosts
from tests.gateway.test_key_limits import bearer, key
from tests.tunnels.polling import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT_PATH = "/v1/chat/completions"
KEYS = (
    key("ann"),
    key("limited", models=(MODEL,), nodes=("a",)),
    key("once", rate=RequestRate(1, 86400.0)),
    key("poor", tokens_per_month=1),
)
HOST = quick_host("a", models=(QWEN_7B, EMBEDDER, LLAMA_8B), answer_tokens=(30, 31))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningGateway]:
    usage = UsageStore(tmp_path_factory.mktemp("usage") / "usage.sqlite")
    async with serve_hosts(HOST, max_parallel=2, spec=GatewaySpec(keys=KEYS), usage_store=usage) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def host(running: RunningGateway) -> AsyncIterator[SimOllama]:
    """The only host, without faults afterwards."""
    host = running.hosts["a"]
    yield host
    await host.set_faults(Faults())


def make_request(prompt: str = "hello", owner: str = "ann", endpoint: str = CHAT_PATH, **more: Any) -> BatchRequest:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}
    return BatchRequest("req-1", "batch_1", 1, "c-1", endpoint, owner, json.dumps(body).encode(), "", 20.0)


async def send(running: RunningGateway, request: BatchRequest) -> Reply:
    return await running.gateway.batch_sender.send(request)


async def test_a_request_is_answered_as_one_of_a_client(running: RunningGateway) -> None:
    reply = await send(running, make_request())
    assert (reply.status, reply.node, reply.attempts) == (200, "a", 1)
    document = json.loads(reply.body)
    assert document["choices"][0]["message"]["content"]
    assert document["usage"]["completion_tokens"]


async def test_it_is_in_the_list_of_requests_at_priority_batch_and_cancelling_ends_it(
    running: RunningGateway, host: SimOllama
) -> None:
    await host.set_faults(Faults(hang=True, paths=("/v1/",)))
    task = asyncio.create_task(send(running, make_request()))
    await wait_until(lambda: running.mesh.snapshot().gateway.in_flight > 0, "the host has the request")
    (shown,) = (await running.client.get("/mesh/requests", headers=bearer("ann"))).json()["requests"]
    assert (shown["priority"], shown["key"], shown["id"], shown["client"]) == ("batch", "ann", "req-1", "ann")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await host.set_faults(Faults())
    assert (await send(running, make_request())).status == 200


async def test_usage_is_that_of_the_owner(running: RunningGateway) -> None:
    for owner in ("ann", COMMAND_LINE, NO_KEY):
        assert (await send(running, make_request(owner=owner))).status == 200
    running.gateway.usage.flush()
    text = (await running.client.get("/metrics", headers=bearer("ann"))).text
    for name in ("ann", "(run)", ""):
        assert metric(text, "gpumesh_key_output_tokens_total", key=name) >= 30, name


async def test_models_and_nodes_of_the_key_hold(running: RunningGateway) -> None:
    assert (await send(running, make_request(owner="limited"))).status == 200
    refused = await send(running, make_request(owner="limited", model=LLAMA_8B.name))
    assert (refused.status, refused.node, refused.attempts) == (403, None, 0)
    error = json.loads(refused.body)["error"]
    assert error["type"] == "permission_error"
    assert "may not use model" in error["message"]


async def test_a_key_that_is_gone_fails_its_requests(running: RunningGateway) -> None:
    reply = await send(running, make_request(owner="former"))
    assert reply.status == 401
    assert "is not in mesh.yaml any more" in json.loads(reply.body)["error"]["message"]


async def test_a_key_that_another_gateway_may_have_is_left_to_it(
    running: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = replace(running.mesh.topology, redis=RedisSpec("redis://127.0.0.1:1"))
    monkeypatch.setattr(running.mesh, "topology", topology)
    with pytest.raises(BatchOwnerUnknown, match="the key former"):
        await send(running, make_request(owner="former"))
    assert (await send(running, make_request())).status == 200


async def test_a_quota_that_is_used_up_is_waited_for(running: RunningGateway) -> None:
    for owner in ("once", "poor"):
        assert (await send(running, make_request(owner=owner))).status == 200
        with pytest.raises(TooManyRequests, match=r"used up|may ask") as full:
            await send(running, make_request(owner=owner))
        assert full.value.retry_after_s > 60.0


async def test_the_error_of_a_server_is_a_reply(running: RunningGateway, host: SimOllama) -> None:
    await host.set_faults(Faults(status=429, paths=("/v1/",)))
    assert (await send(running, make_request())).status == 429
    await host.set_faults(Faults())
    bad = await send(running, replace(make_request(), body=b'{"model": "qwen2.5:7b", "messages": []}'))
    assert (bad.status, bad.node) == (400, "a")
    assert "error" in json.loads(bad.body)
    broken = await send(running, replace(make_request(), body=b"[1]"))
    assert (broken.status, broken.node) == (400, None)


async def test_an_error_of_the_gateway_is_raised_with_its_type(running: RunningGateway, host: SimOllama) -> None:
    with pytest.raises(ModelMissing, match="nobody"):
        await send(running, make_request(model="nobody:1b"))
    await host.set_faults(Faults(hang=True, paths=("/v1/",)))
    with pytest.raises(DeadlineExceeded):
        await send(running, replace(make_request(), timeout_s=0.1))


async def test_an_answer_that_is_too_long_to_be_held_comes_whole(
    running: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_reading, "HELD_BYTES", 1000)
    request = make_request(endpoint="/v1/embeddings", model=EMBEDDER.name, input=["one", "two"])
    reply = await send(running, request)
    assert (reply.status, reply.node, len(json.loads(reply.body)["data"])) == (200, "a", 2)
    monkeypatch.setattr(in_process, "MAX_REPLY_BYTES", 4000)
    with pytest.raises(StreamCut, match="too long"):
        await send(running, request)


async def test_no_answer_streams(running: RunningGateway) -> None:
    for value in (None, False):
        assert (await send(running, make_request(stream=value))).status == 200
    reply = await send(running, make_request(stream=True))
    assert (reply.status, reply.attempts) == (400, 0)
    assert "cannot stream" in json.loads(reply.body)["error"]["message"]


async def test_no_line_reaches_a_route_that_changes_something(running: RunningGateway) -> None:
    for path in ("/mesh/nodes/a/drain", "/api/delete", "/v1/files", "/v1/models/load"):
        reply = await send(running, make_request(owner=COMMAND_LINE, endpoint=path))
        assert (reply.status, reply.attempts) == (404, 0)
    assert not running.mesh.snapshot().nodes[0].health.value.startswith("drain")
    assert (await send(running, make_request())).status == 200


async def test_a_person_can_cancel_a_request_of_a_batch(running: RunningGateway, host: SimOllama) -> None:
    await host.set_faults(Faults(hang=True, paths=("/v1/",)))
    task = asyncio.create_task(send(running, make_request()))
    await wait_until(lambda: running.mesh.snapshot().gateway.in_flight > 0, "the request is on its way")
    (shown,) = (await running.client.get("/mesh/requests", headers=bearer("ann"))).json()["requests"]
    await running.client.post(f"/mesh/requests/{shown['number']}/cancel", headers=bearer("ann"))
    reply = await task
    assert reply.status == 499
    assert "cancelled" in json.loads(reply.body)["error"]["message"]


async def test_a_prompt_is_answered_as_one_of_run(running: RunningGateway, host: SimOllama) -> None:
    line = json.dumps({"prompt": "hello", "system": "Be brief.", "model": MODEL, "options": {"num_predict": 3}})
    request = replace(make_request(owner=COMMAND_LINE, endpoint=PROMPT_ENDPOINT), body=line.encode())
    reply = await send(running, request)
    document = json.loads(reply.body)
    assert (reply.status, reply.node, document["node"], document["error"]) == (200, "a", "a", None)
    assert document["response"]
    assert document["tokens"] == 3
    assert document["ttft_ms"] > 0
    several = replace(request, body=b'"hello"')
    with pytest.raises(UsageError, match="model"):
        await send(running, several)
    with pytest.raises(UsageError, match="no node"):
        await send(running, replace(request, body=b'{"prompt": "x", "model": "qwen2.5:7b", "node": "nowhere"}'))
    await host.set_faults(Faults(status=400, paths=("/api/chat",)))
    with pytest.raises(BackendStatus) as refused:
        await send(running, request)
    assert refused.value.status == 400


async def test_a_gateway_without_an_address_sends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "usage.sqlite"
    async with SimOllama(HOST) as host:
        spec = GatewaySpec(keys=KEYS, api_key_env="NOT_SET")
        topology = Topology("test", (node("a", host.url),), spec)
        async with (
            Mesh(topology) as mesh,
            Gateway(mesh, listens=False, drain_s=0.0, usage_store=UsageStore(path)) as gateway,
        ):
            await mesh.wait_first_report(10.0)
            assert (gateway.url, mesh.gateway.url) == ("", None)
            assert (await gateway.batch_sender.send(make_request())).status == 200
            await host.set_faults(Faults(hang=True, paths=("/v1/",)))
            task = asyncio.create_task(gateway.batch_sender.send(make_request()))
            await wait_until(lambda: mesh.snapshot().gateway.in_flight > 0, "the request is on its way")
        with pytest.raises(NoNodeError, match="stopped"):
            await task
        (counts,) = dict(read_rows(path, ("key",), since="2026-01-01")).values()
        assert counts.answer_tokens >= 30
