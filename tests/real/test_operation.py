"""A running mesh is drained, resumed and stopped by the command while clients use it."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import httpx
import pytest

from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from tests.gateway.fleet import MODEL, quick_host
from tests.http_clients import loopback_client
from tests.real.command import Gpumesh, write_config
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow]

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Up:
    gpumesh: Gpumesh
    client: httpx.AsyncClient
    hosts: dict[str, SimOllama]

    async def chats(self, count: int) -> set[str]:
        """The nodes that answered."""
        answers = [await self.client.post("/api/chat", json={**CHAT, "stream": False}) for _ in range(count)]
        assert {answer.status_code for answer in answers} == {200}
        return {answer.headers["X-GPUMesh-Node"] for answer in answers}


@pytest.fixture
async def up(alone: Gpumesh) -> AsyncIterator[Up]:
    alone = replace(alone, warm=True)
    profiles = [quick_host(name, tokens_per_s=60.0, answer_tokens=(4, 4), slots=4) for name in ("a", "b")]
    async with SimOllama(profiles[0]) as a, SimOllama(profiles[1]) as b:
        hosts = {"a": a, "b": b}
        nodes = [{"name": name, "backend": {"url": host.url, "max_parallel": 4}} for name, host in hosts.items()]
        write_config(alone.config, nodes, model=MODEL)
        await alone("up", "-d")
        url = (await alone("status", "--json")).json()["gateway"]["url"]
        async with loopback_client(base_url=url, timeout=30) as client:
            yield Up(alone, client, hosts)
        await alone("down", code=None)


async def test_drain_and_resume(up: Up) -> None:
    long = {**CHAT, "options": {"num_predict": 100}, "messages": [{"role": "user", "content": "a long one"}]}
    up.hosts["a"].profile = quick_host("a", answer_tokens=(100, 100))
    # The answer takes eight seconds: on a busy machine so do the commands that must find it in flight.
    await up.hosts["a"].set_faults(Faults(slow=5.0))
    async with up.client.stream("POST", "/api/chat", json=long, headers={"X-GPUMesh-Node": "a"}) as begun:
        pieces = begun.aiter_lines()
        await anext(pieces)
        await up.gpumesh("drain", "a")
        assert await up.chats(6) == {"b"}
        status = (await up.gpumesh("status", "--json")).json()
        assert status["nodes"][0]["health"] == "draining"
        assert status["nodes"][0]["load"]["in_flight"] == 1
        rest = [json.loads(line) async for line in pieces]
    assert rest[-1]["done"] is True
    assert rest[-1]["eval_count"] == 100, "what ran there ended by itself, on the node on which it began"
    assert begun.headers["X-GPUMesh-Node"] == "a"
    await up.gpumesh("resume", "a")
    headers = {"X-GPUMesh-Node": "a"}
    again = await up.client.post("/api/chat", json={**CHAT, "stream": False}, headers=headers)
    assert again.status_code == 200
    await up.gpumesh("drain", "nowhere", code=2)


async def test_down_lets_what_is_in_flight_end(up: Up) -> None:
    for host in up.hosts.values():
        host.profile = quick_host("x", tokens_per_s=60.0, answer_tokens=(120, 120))
    streams = [asyncio.create_task(up.client.post("/api/chat", json=CHAT)) for _ in range(4)]
    await wait_until(lambda: sum(host.counters.running for host in up.hosts.values()) == 4, "all run")
    await up.gpumesh("down")
    answers = [await stream for stream in streams]
    assert [json.loads(answer.text.splitlines()[-1])["done"] for answer in answers] == [True] * 4
    await wait_until(lambda: not up.gpumesh.processes(), "the mesh has ended")
    with pytest.raises(httpx.ConnectError):
        await up.client.get("/healthz")


async def test_the_access_log_is_on_by_default_and_shown_by_logs(up: Up) -> None:
    await up.client.post("/api/chat", json={**CHAT, "messages": [{"role": "user", "content": "a secret"}]})
    await up.client.get("/nowhere")
    await up.gpumesh("down")
    lines = (await up.gpumesh("logs", "--access", "--json")).lines()
    assert [(line["path"], line["status"], line["outcome"]) for line in lines] == [
        ("/api/chat", 200, "served"),
        ("/nowhere", 404, "refused"),
    ]
    shown = (await up.gpumesh("logs", "--access")).out
    assert "POST /api/chat" in shown
    assert MODEL in shown
    (file,) = up.gpumesh.home.rglob("*.access.jsonl")
    assert "secret" not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    off = json.loads(up.gpumesh.config.read_text())
    off["gateway"]["access_log"] = False
    up.gpumesh.config.write_text(json.dumps(off))
    file.unlink()
    await up.gpumesh("up", "-d")
    url = (await up.gpumesh("status", "--json")).json()["gateway"]["url"]
    async with loopback_client(base_url=url) as client:
        await client.get("/healthz")
    await up.gpumesh("down")
    assert not list(up.gpumesh.home.rglob("*.access.jsonl"))
