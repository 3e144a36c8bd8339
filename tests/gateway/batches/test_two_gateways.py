"""Two gateways that share the batches in one Redis, and do not have the same keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.batches.opening import create_batch_store
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import QWEN_7B
from gpumesh.topology import GatewaySpec, RedisSpec, Topology
from tests.gateway.batches.serving import work_on_batches
from tests.gateway.fleet import MODEL, RunningGateway, node, quick_host, serve_nodes
from tests.gateway.test_key_limits import bearer, key
from tests.prerequisites import needs
from tests.redis_server import redis_server

pytestmark = [pytest.mark.real, needs("redis-server")]

CHAT_PATH = "/v1/chat/completions"
REQUESTS = 20


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisSpec]:
    async with redis_server(tmp_path) as server:
        yield RedisSpec(server.url)


async def submit(gateway: RunningGateway, headers: dict[str, str]) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    lines = [{"custom_id": f"r{number}", "url": CHAT_PATH, "body": body} for number in range(REQUESTS)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    file = await gateway.client.post(
        "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}, headers=headers
    )
    batch = {"input_file_id": file.json()["id"], "endpoint": CHAT_PATH, "completion_window": "24h"}
    return str((await gateway.client.post("/v1/batches", json=batch, headers=headers)).json()["id"])


async def wait_completed(gateway: RunningGateway, batch_id: str, headers: dict[str, str]) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            batch: dict[str, Any] = (await gateway.client.get(f"/v1/batches/{batch_id}", headers=headers)).json()
            if batch["status"] == "completed":
                return batch
            await asyncio.sleep(0.05)


async def test_each_gateway_works_on_the_batches_whose_keys_it_has(
    redis: RedisSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = Topology("two", (), redis=redis)
    async with (
        SimOllama(quick_host("a", models=(QWEN_7B,))) as host,
        create_batch_store(mesh, tmp_path) as first_store,
        create_batch_store(mesh, tmp_path) as second_store,
        serve_nodes((node("a", host.url),), spec=GatewaySpec(keys=(key("ann"),)), batch_store=first_store) as first,
        serve_nodes((node("a", host.url),), batch_store=second_store) as second,
    ):
        for gateway in (first, second):
            monkeypatch.setattr(gateway.mesh, "topology", replace(gateway.mesh.topology, redis=redis))
        anns, others = await submit(first, bearer("ann")), await submit(second, {})
        async with work_on_batches(second, second_store):
            await wait_completed(second, others, {})
            assert (await first_store.get_batch(anns)).counts.unfinished == REQUESTS, "it is left to the first gateway"
            async with work_on_batches(first, first_store):
                batch = await wait_completed(first, anns, bearer("ann"))
        assert batch["request_counts"] == {"total": REQUESTS, "completed": REQUESTS, "failed": 0}
        assert (await second.client.get(f"/v1/batches/{anns}")).status_code == 404
        assert (await first.client.get(f"/v1/batches/{others}", headers=bearer("ann"))).status_code == 404
