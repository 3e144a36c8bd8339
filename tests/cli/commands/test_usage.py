"""`gpumesh usage`, of a real mesh that is killed: what was used is what the servers and the clients have counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx

from gpumesh.gateway.usage.recorder import SPACING_S
from tests.cli.meshes import MODEL, isolated_command, quick_host, simulated_mesh
from tests.http_clients import loopback_client
from tests.tunnels.polling import wait_until

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 50}
LIMITS: dict[str, dict[str, Any]] = {"chat": {"tokens_per_month": "1M", "rate": "1000/m"}, "night": {}}
KEYS = [{"name": name, "hash": hashlib.sha256(name.encode()).hexdigest(), **limits} for name, limits in LIMITS.items()]
COUNTS = ("requests", "prompt_tokens", "completion_tokens")


async def ask(client: httpx.AsyncClient, path: str, node: str = "alpha", **changes: Any) -> tuple[int, int]:
    """Sends a chat. Returns the tokens of the prompt and of the answer, as the client is told."""
    answer = await client.post(path, json={**CHAT, **changes}, headers={"X-GPUMesh-Node": node})
    assert answer.status_code == 200, answer.text
    counts: dict[str, int] = {}
    for line in answer.text.splitlines():
        if "_tokens" in line or "_count" in line:
            document = json.loads(line.removeprefix("data: "))
            usage = document.get("usage") or document.get("message", {}).get("usage") or document
            counts |= {name: value for name, value in usage.items() if isinstance(value, int)}
    prompt = counts.get("prompt_eval_count") or counts.get("prompt_tokens") or counts.get("input_tokens")
    output = counts.get("eval_count") or counts.get("completion_tokens") or counts.get("output_tokens")
    assert prompt is not None
    assert output is not None
    return prompt, output


async def use_mesh(url: str, key: str) -> tuple[int, int, int]:
    """Asks in every dialect. Returns the requests, and the tokens of their prompts and answers."""
    async with loopback_client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as client:
        counts = [
            await ask(client, "/api/chat", stream=False),
            await ask(client, "/api/chat"),
            await ask(client, "/v1/chat/completions"),
            await ask(client, "/v1/chat/completions", stream=True, stream_options={"include_usage": True}),
            await ask(client, "/v1/messages"),
            await ask(client, "/v1/messages", "beta", stream=True),
            *await asyncio.gather(*(ask(client, "/api/chat", stream=False) for _ in range(8))),
        ]
    return len(counts), sum(prompt for prompt, _ in counts), sum(output for _, output in counts)


async def test_usage_survives_a_kill_to_the_last_request(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha"), quick_host("beta", ssh=False)) as mesh:
            mesh.write(keys=KEYS)
            await gpumesh("up", "-d")
            url = (await gpumesh("status", "--json")).json()["gateway"]["url"]
            used = {name: await use_mesh(url, name) for name in LIMITS}
            prompt = (await gpumesh("run", "--node", "alpha", "--json", "Why?")).json()
            await asyncio.sleep(2 * SPACING_S)  # so much may lie between two lines of the journal
            os.kill(gpumesh.leader(), signal.SIGKILL)
            report = (await gpumesh("usage", "--json")).json()
            counts = {row["key"]: tuple(row[name] for name in COUNTS) for row in report["rows"]}
            (requests, _, tokens) = counts.pop("(run)")
            assert (requests, tokens) == (1, prompt["tokens"])
            assert counts == used
            assert report["total"]["estimated_requests"] == 0
            assert [budget["used_tokens"] for budget in report["budgets"]] == [sum(used["chat"][1:])]
            nodes = {row["node"]: row for row in (await gpumesh("usage", "--json", "--by", "node")).json()["rows"]}
            for name, host in mesh.hosts.items():
                assert nodes[name]["completion_tokens"] == host.counters.tokens
                assert nodes[name]["gpu_seconds"] > 0.0
            assert nodes["alpha"]["energy_wh"] > 0.0
            assert nodes["beta"]["energy_wh"] is None, "nobody has told its power"
            table = (await gpumesh("usage")).out
            assert "night" in table
            assert f"{sum(used['chat'][1:]):,}" in table
            assert "of 1,000,000" in table
        await wait_until(lambda: not gpumesh.processes(), "the workers have ended with the mesh")
