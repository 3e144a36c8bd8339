"""The gateway from start to stop, and failover, queue and drain as its clients see them."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest

from gpumesh.errors import MeshAlreadyRunning, UsageError
from gpumesh.gateway.app import Gateway
from gpumesh.lab.profile import Faults
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import GatewayPhase
from gpumesh.topology import GatewaySpec, PolicyKind, Topology
from tests.gateway.fleet import (
    CHAT,
    MODEL,
    A,
    RunningGateway,
    lines,
    quick_host,
    serve_hosts,
)
from tests.http_clients import loopback_client
from tests.tunnels.polling import wait_until

# -- failover, queue and drain, as a client sees them ----------------------------------------------------------------


async def test_a_failed_attempt_shows_in_the_head_only() -> None:
    async with serve_hosts(spec=GatewaySpec(policy=PolicyKind.ROUND_ROBIN)) as fleet:
        await fleet.hosts["a"].set_faults(Faults(disconnect=True, paths=("/api/chat",)))
        answers = [await fleet.chat() for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert {answer.headers["X-GPUMesh-Node"] for answer in answers} == {"b"}
        assert any(answer.headers["X-GPUMesh-Attempts"] == "2" for answer in answers)


SLOW = quick_host("slow", tokens_per_s=20.0, answer_tokens=(2000, 2000))


async def test_waiting_requests_are_shown_in_the_order_of_service() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        waiting = []
        for name, priority in (("r-batch", "batch"), ("r-normal", "normal"), ("r-now", "interactive")):
            headers = {"X-Request-Id": name, "X-GPUMesh-Priority": priority}
            waiting.append(tasks.create_task(fleet.chat(headers=headers)))
            await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == len(waiting), "it waits")
        gateway = (await fleet.client.get("/mesh/status")).json()["gateway"]
        assert (gateway["in_flight"], gateway["queued"]) == (1, 3)
        assert [entry["id"] for entry in gateway["waiting"]] == ["r-now", "r-normal", "r-batch"]
        assert [entry["position"] for entry in gateway["waiting"]] == [0, 1, 2]
        assert {entry["model"] for entry in gateway["waiting"]} == {MODEL}
        assert all(entry["waited_s"] >= 0 for entry in gateway["waiting"])
        for task in (first, *waiting):
            task.cancel()


async def test_a_client_that_leaves_leaves_the_queue_and_stops_the_generation() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet:
        first = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        second = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "the second waits")
        second.cancel()
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 0, "it has left the queue")
        assert fleet.count_running() == 1
        first.cancel()
        await wait_until(lambda: fleet.count_running() == 0, "the host has stopped")
        await wait_until(lambda: fleet.mesh.request_counters.in_flight == 0, "every request has ended")
        counters = fleet.mesh.request_counters
        assert (counters.accepted, counters.cancelled, counters.failed) == (2, 2, 0)


async def test_a_full_queue_refuses_clients_with_a_retry_time() -> None:
    async with serve_hosts(SLOW, max_parallel=1, spec=GatewaySpec(max_queue=1)) as fleet, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        second = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "the second waits")
        refused = await fleet.chat()
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "1 requests wait already" in refused.json()["error"]
        openai = await fleet.client.post("/v1/chat/completions", json=CHAT)
        assert (openai.status_code, openai.json()["error"]["type"]) == (503, "api_error")
        anthropic = await fleet.client.post("/v1/messages", json={**CHAT, "max_tokens": 5})
        assert anthropic.json()["error"]["type"] == "overloaded_error"
        for task in (first, second):
            task.cancel()


async def test_an_interactive_request_is_not_refused_while_batch_fills_the_queue() -> None:
    batch, interactive = ({"X-GPUMesh-Priority": name} for name in ("batch", "interactive"))
    async with serve_hosts(SLOW, max_parallel=1, spec=GatewaySpec(max_queue=8)) as fleet, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        waiting = [tasks.create_task(fleet.chat(headers=batch)) for _ in range(20)]
        await wait_until(lambda: sum(task.done() for task in waiting) >= 12, "the queue is full of batch")
        assert {task.result().status_code for task in waiting if task.done()} == {503}
        queued = fleet.mesh.snapshot().gateway.queued
        urgent = tasks.create_task(fleet.chat(headers=interactive, options={"num_predict": 2}))
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == queued + 1, "it waits")
        running.cancel()
        assert (await urgent).status_code == 200, "it is the next"
        assert sum(not task.done() for task in waiting) >= queued - 1
        for task in waiting:
            task.cancel()


async def test_a_deadline_holds_while_a_request_waits() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the first runs")
        late = await fleet.chat(headers={"X-GPUMesh-Timeout": "0.2"})
        assert late.status_code == 504
        assert "no place became free" in late.json()["error"]
        assert fleet.mesh.snapshot().gateway.queued == 0
        assert fleet.hosts["slow"].counters.started == 1
        first.cancel()


async def test_a_deadline_holds_while_a_node_works() -> None:
    async with serve_hosts(SLOW) as fleet:
        late = await fleet.chat(headers={"X-GPUMesh-Timeout": "0.3"})
        assert late.status_code == 504
        await wait_until(lambda: fleet.count_running() == 0, "the host has stopped")


@pytest.mark.slow
async def test_a_drained_node_finishes_its_requests_and_gets_no_new_ones() -> None:
    hosts = (replace(SLOW, name="a"), quick_host("b"))
    async with serve_hosts(*hosts, max_parallel=4) as fleet:
        body = {**CHAT, "options": {"num_predict": 15}}
        async with fleet.client.stream("POST", "/api/chat", json=body, headers={"X-GPUMesh-Node": "a"}) as stream:
            pieces = stream.aiter_lines()
            await anext(pieces)
            fleet.mesh.drain("a")
            answers = [await fleet.chat() for _ in range(5)]
            assert {answer.headers["X-GPUMesh-Node"] for answer in answers} == {"b"}
            assert fleet.mesh.snapshot().node("a").health == "draining"
            rest = [json.loads(line) async for line in pieces]
        assert rest[-1]["done"] is True, "what ran there was not touched"
        only = await fleet.chat(headers={"X-GPUMesh-Node": "a"})
        assert only.status_code == 503
        fleet.mesh.resume("a")
        again = await fleet.chat(headers={"X-GPUMesh-Node": "a"}, options={"num_predict": 1})
        assert again.headers["X-GPUMesh-Node"] == "a"


# -- lifetime --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_closing_finishes_requests_in_flight_and_accepts_no_new_ones() -> None:
    profile = quick_host("a", tokens_per_s=50.0, answer_tokens=(25, 25), slots=4)
    async with serve_hosts(profile, max_parallel=2) as fleet, AsyncExitStack() as closing_stack:
        gateway = await closing_stack.enter_async_context(Gateway(fleet.mesh, port=0))
        async with loopback_client(base_url=gateway.url, timeout=20) as client:
            await client.get("/")  # a kept connection, which must not hold up the end
            answers = [asyncio.create_task(client.post("/api/chat", json=CHAT)) for _ in range(3)]
            await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "two are in flight, a third waits")
            closing = asyncio.create_task(closing_stack.aclose())
            await wait_until(lambda: fleet.mesh.gateway.state is GatewayPhase.DRAINING, "it drains")
            with pytest.raises(httpx.TransportError):
                await client.get("/healthz")
            done = [await answer for answer in answers]
            assert [lines(answer.text)[-1]["done"] for answer in done] == [True] * 3
            await closing
            assert fleet.mesh.gateway.state is GatewayPhase.OFF


async def test_past_the_drain_time_requests_end_with_an_error_that_says_why() -> None:
    """In a stream that has begun, and with a status where nothing was sent."""
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(serve_hosts(SLOW, max_parallel=1))
        client = await stack.enter_async_context(loopback_client(timeout=20))
        closing_stack = AsyncExitStack()
        gateway = await closing_stack.enter_async_context(Gateway(fleet.mesh, port=0, drain_s=0.1))
        stream = await stack.enter_async_context(client.stream("POST", f"{gateway.url}/api/chat", json=CHAT))
        received = stream.aiter_lines()
        await anext(received)
        waiting = asyncio.create_task(client.post(f"{gateway.url}/v1/chat/completions", json=CHAT))
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "the second waits")
        loop = asyncio.get_running_loop()
        asked = loop.time()
        await closing_stack.aclose()
        assert loop.time() - asked < 10.0
        rest = [json.loads(line) async for line in received]
        assert rest[-1] == {"error": "the gateway was stopped"}
        refused = await waiting
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        assert refused.json()["error"]["message"].startswith("the gateway was stopped")
        await wait_until(lambda: fleet.count_running() == 0, "the host has stopped")
        counters = fleet.mesh.request_counters
        assert (counters.accepted, counters.in_flight) == (2, 0)


async def test_progress_that_is_cut_ends_with_an_error_too() -> None:
    """Progress is no generated stream, so it does not notice a deadline. Once ``stop_now`` is set it ends at once."""
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(serve_hosts(quick_host("a", pull_s=60.0)))
        client = await stack.enter_async_context(loopback_client(timeout=20))
        closing_stack, stop_now = AsyncExitStack(), asyncio.Event()
        gateway = await closing_stack.enter_async_context(Gateway(fleet.mesh, port=0, drain_s=60.0, stop_now=stop_now))
        pull = client.stream("POST", f"{gateway.url}/api/pull", json={"model": "llama3.2:1b"})
        received = (await stack.enter_async_context(pull)).aiter_lines()
        await anext(received)
        closing = asyncio.create_task(closing_stack.aclose())
        await wait_until(lambda: fleet.mesh.gateway.state is GatewayPhase.DRAINING, "it drains")
        stop_now.set()
        assert json.loads([line async for line in received][-1]) == {"error": "the gateway was stopped"}
        await closing


async def test_an_address_that_is_taken_is_an_error(fleet: RunningGateway) -> None:
    with pytest.raises(MeshAlreadyRunning, match="cannot listen on 127"):
        async with Gateway(fleet.mesh, port=fleet.port):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box.example.org"])
async def test_listening_beyond_loopback_needs_a_key(host: str) -> None:
    mesh = Mesh(Topology("t", (), GatewaySpec(host=host, port=0)))
    with pytest.raises(UsageError, match="lets other machines use your GPUs"):
        Gateway(mesh)


async def test_beyond_loopback_with_a_key_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "k-12345")
    async with serve_hosts(A, spec=GatewaySpec(host="0.0.0.0", api_key_env="GATEWAY_KEY")) as fleet:
        assert "without encryption" in caplog.text
        client = loopback_client(base_url=f"http://127.0.0.1:{fleet.port}")
        async with client:
            assert (await client.get("/api/tags")).status_code == 401
            assert (await client.get("/api/tags", headers={"x-api-key": "k-12345"})).status_code == 200
            assert (await client.get("/api/tags", headers={"Authorization": "Bearer k-12345"})).status_code == 200
            assert (await client.get("/healthz")).status_code == 200, "whether we are well is no secret"
            assert (await client.get("/metrics")).status_code == 401
            refused = await client.post("/v1/messages", json={})
            assert refused.json()["error"]["type"] == "authentication_error"


async def test_a_bug_in_a_handler_costs_one_answer_and_is_logged(
    fleet: RunningGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(kinds: object) -> None:
        raise RuntimeError("a bug with a secret in it")

    monkeypatch.setattr(fleet.mesh, "usable_nodes", broken)
    answer = await fleet.client.get("/api/tags")
    assert answer.status_code == 500
    assert answer.json() == {"error": "the gateway failed inside"}
    assert "a bug with a secret in it" in caplog.text
    monkeypatch.undo()
    assert (await fleet.client.get("/api/tags")).status_code == 200


async def test_repr_tells_the_state(fleet: RunningGateway) -> None:
    assert repr(fleet.gateway) == f"<Gateway {fleet.gateway.url} serving 0 active>"
