"""A real gateway over a real mesh of simulated servers in this process, reached directly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from gpumesh.batches.base import BatchStore
from gpumesh.gateway.app import Gateway
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.gateway.usage.store import UsageStore
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN3_8B, QWEN_7B, HostProfile
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import BackendKind, BackendSpec, GatewaySpec, ModelSpec, NodeSpec, Target, Topology
from tests.http_clients import loopback_client

MODEL = QWEN_7B.name
QUICK: dict[str, Any] = {
    "tokens_per_s": 1000.0,
    "prefill_tokens_per_s": None,
    "load_s": 0.0,
    "pull_s": 0.05,
    "answer_tokens": (6, 12),
}


def quick_host(name: str, **changes: Any) -> HostProfile:
    return profile.make_host(name, **{**QUICK, **changes})


CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}

# Unequal in what they have: ``a`` embeds and thinks, ``b`` has the llama, both have MODEL.
A = quick_host("a", models=(QWEN_7B, EMBEDDER, QWEN3_8B))
B = quick_host("b", models=(QWEN_7B, LLAMA_8B))


@dataclass
class RunningGateway:
    mesh: Mesh
    gateway: Gateway
    hosts: Mapping[str, SimOllama]
    client: httpx.AsyncClient

    @property
    def port(self) -> int:
        port = urlsplit(self.gateway.url).port
        assert port is not None
        return port

    async def chat(self, prompt: str = "hello", **more: Any) -> httpx.Response:
        """Not streamed; ``headers`` go where headers go."""
        headers = more.pop("headers", None)
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": False, **more}
        return await self.client.post("/api/chat", json=body, headers=headers)

    def count_running(self) -> int:
        """How many answers the hosts are working on."""
        return sum(host.counters.running for host in self.hosts.values())


def node(name: str, url: str, *, kind: BackendKind = BackendKind.OLLAMA, max_parallel: int | None = None) -> NodeSpec:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return NodeSpec(name, BackendSpec(kind, (Target(parts.hostname, parts.port),), max_parallel=max_parallel))


@asynccontextmanager
async def serve_nodes(
    nodes: tuple[NodeSpec, ...],
    hosts: Mapping[str, SimOllama] | None = None,
    *,
    spec: GatewaySpec | None = None,
    bounds: Bounds | None = None,
    access_log: AccessLog | None = None,
    usage_store: UsageStore | None = None,
    batch_store: BatchStore | None = None,
    drain_s: float = 10.0,
    models: tuple[ModelSpec, ...] = (),
) -> AsyncIterator[RunningGateway]:
    topology = Topology("test", nodes, replace(spec or GatewaySpec(), port=0), models=models)
    async with (
        Mesh(topology) as mesh,
        Gateway(
            mesh,
            bounds=bounds,
            access_log=access_log,
            usage_store=usage_store,
            batch_store=batch_store,
            drain_s=drain_s,
        ) as gateway,
        loopback_client(base_url=gateway.url, timeout=20) as client,
    ):
        await mesh.wait_first_report(10.0)
        yield RunningGateway(mesh, gateway, hosts or {}, client)


@asynccontextmanager
async def serve_hosts(
    *profiles: HostProfile, max_parallel: int | None = None, kind: BackendKind = BackendKind.OLLAMA, **more: Any
) -> AsyncIterator[RunningGateway]:
    """``more`` as for ``serve_nodes``. Without profiles: A and B."""
    async with AsyncExitStack() as stack:
        hosts = {profile.name: await stack.enter_async_context(SimOllama(profile)) for profile in profiles or (A, B)}
        nodes = tuple(node(name, host.url, kind=kind, max_parallel=max_parallel) for name, host in hosts.items())
        yield await stack.enter_async_context(serve_nodes(nodes, hosts, **more))


def lines(text: str) -> list[Any]:
    """Of NDJSON."""
    return [json.loads(line) for line in text.splitlines()]


def events(text: str) -> list[Any]:
    """The data of server-sent events; ``[DONE]`` as it is."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of this name whose labels include these."""
    from prometheus_client.parser import text_string_to_metric_families

    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def send_raw(port: int, data: bytes, *, wait_s: float = 10.0) -> bytes:
    """All that comes back on a connection of its own, until the other side closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(wait_s):
            return await reader.read()
    finally:
        writer.close()
