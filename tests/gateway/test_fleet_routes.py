"""Routes about the whole fleet: lists that are merged, version, health, status and metrics."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN3_8B, Faults
from gpumesh.state import STATUS_SCHEMA
from gpumesh.topology import GatewaySpec, PolicyKind
from gpumesh.wire import status_from_json
from tests.gateway.fleet import MODEL, A, RunningGateway, lines, metric, quick_host, serve_hosts
from tests.tunnels.polling import wait_until


async def names(fleet: RunningGateway, path: str, key: str = "name") -> set[str]:
    document = (await fleet.client.get(path)).json()
    return {entry[key] for entry in document["models" if "models" in document else "data"]}


ALL = {MODEL, EMBEDDER.name, LLAMA_8B.name, QWEN3_8B.name}


async def test_lists_are_the_union_over_the_nodes(fleet: RunningGateway) -> None:
    assert await names(fleet, "/api/tags") == ALL
    assert await names(fleet, "/v1/models", "id") == ALL
    assert await names(fleet, "/api/ps") == set()
    await fleet.chat(headers={"X-GPUMesh-Node": "a"})
    await fleet.chat(model=LLAMA_8B.name)
    assert await names(fleet, "/api/ps") == {MODEL, LLAMA_8B.name}
    head = await fleet.client.head("/api/tags")
    assert (head.status_code, head.content) == (200, b"")


async def test_a_node_that_is_slow_is_missing_from_a_list_and_does_not_hold_it_up(
    fleet: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumesh.gateway.fleet_routes.LIST_TIMEOUT_S", 0.3)
    await fleet.hosts["b"].set_faults(Faults(hang=True, paths=("/api/tags",)))
    assert await names(fleet, "/api/tags") == ALL - {LLAMA_8B.name}


async def test_the_version_is_the_oldest_of_all_nodes() -> None:
    hosts = (
        quick_host("new", version="0.33.0"),
        quick_host("old", version="0.9.10-rc1"),
        quick_host("mid", version="0.12.6"),
    )
    async with serve_hosts(*hosts) as fleet:
        assert (await fleet.client.get("/api/version")).json() == {"version": "0.9.10-rc1"}


@pytest.mark.slow
async def test_health_follows_the_nodes(fleet: RunningGateway) -> None:
    well = await fleet.client.get("/healthz")
    assert (well.status_code, well.json()) == (200, {"status": "ok", "nodes_usable": 2})
    for host in fleet.hosts.values():
        await host.set_faults(Faults(refuse=True))
    await wait_until(lambda: not fleet.mesh.usable_nodes(), "both are known to be away")
    ill = await fleet.client.get("/healthz")
    assert (ill.status_code, ill.json()["nodes_usable"]) == (503, 0)
    assert (await fleet.client.get("/api/tags")).json() == {"models": []}
    refused = await fleet.chat()
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "2"


async def test_the_status_is_that_of_the_mesh(fleet: RunningGateway) -> None:
    document = (await fleet.client.get("/mesh/status")).json()
    assert document["schema"] == STATUS_SCHEMA
    state = status_from_json(document)
    assert state.gateway.url == fleet.gateway.url
    assert [node.name for node in state.nodes] == ["a", "b"]


async def test_metrics_count_requests_by_outcome() -> None:
    async with serve_hosts(spec=GatewaySpec(policy=PolicyKind.ROUND_ROBIN)) as fleet:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 9}}
        for _ in range(3):
            await fleet.client.post("/api/chat", json=body)
        await fleet.chat(options={"num_predict": 9})
        await fleet.hosts["a"].set_faults(Faults(disconnect=True, paths=("/api/chat",)))
        for _ in range(2):
            await fleet.chat()
        await fleet.chat(model="made-up:1b")
        await fleet.client.get("/secret-path-of-a-client")
        await fleet.client.put("/api/chat")
        answer = await fleet.client.get("/metrics")
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert len(families) > 20
        chats = {"route": "/api/chat", "model": MODEL, "outcome": "served", "code": "200"}
        assert metric(text, "gpumesh_requests_total", **chats) == 6
        assert {node for node in "ab" if metric(text, "gpumesh_requests_total", node=node, **chats)} == {"a", "b"}
        assert metric(text, "gpumesh_requests_total", outcome="refused", code="404", model="") == 2
        assert metric(text, "gpumesh_requests_total", route="other", code="404") == 1
        assert metric(text, "gpumesh_requests_total", code="405") == 1
        assert metric(text, "gpumesh_output_tokens_total", model=MODEL) >= 36
        assert metric(text, "gpumesh_time_to_first_token_seconds_count", model=MODEL) == 3
        assert metric(text, "gpumesh_attempts_total", node="a", outcome="unreachable") >= 1
        assert metric(text, "gpumesh_attempts_total", outcome="served") == 6
        assert "made-up" not in text
        assert "secret-path" not in text


async def test_a_continuation_is_counted() -> None:
    cut = Faults(cut_after_tokens=3, paths=("/api/chat",), times=1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with serve_hosts() as fleet:
        for host in fleet.hosts.values():
            await host.set_faults(cut)
        answer = await fleet.client.post("/api/chat", json=body)
        assert lines(answer.text)[-1]["done"] is True
        text = (await fleet.client.get("/metrics")).text
        assert metric(text, "gpumesh_continuations_total", model=MODEL) >= 1
        assert metric(text, "gpumesh_attempts_total", outcome="cut") >= 1
        assert metric(text, "gpumesh_requests_total", outcome="served", route="/api/chat") == 1


async def test_a_client_that_left_is_counted() -> None:
    async with serve_hosts(quick_host("a", tokens_per_s=5.0)) as fleet:
        leaving = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "it runs")
        leaving.cancel()
        await wait_until(lambda: fleet.mesh.request_counters.cancelled == 1, "it is known to have left")
        text = (await fleet.client.get("/metrics")).text
        assert metric(text, "gpumesh_requests_total", outcome="cancelled", code="499") == 1
        assert metric(text, "gpumesh_attempts_total", node="a", outcome="client-gone") == 1


async def test_unknown_models_and_paths_add_no_series() -> None:
    async with serve_hosts(A) as fleet:
        await fleet.chat(model="made-up:1b")
        before = len((await fleet.client.get("/metrics")).text.splitlines())
        for number in range(50):
            await fleet.chat(model=f"made-up:{number}")
        assert len((await fleet.client.get("/metrics")).text.splitlines()) <= before + 5
