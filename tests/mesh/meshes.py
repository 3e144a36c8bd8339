"""A mesh over simulated and scripted servers in this process, reached directly. The first node is preferred."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gpumesh.backends.base import HttpCall
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import HostProfile, ModelProfile
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests.answer import Answer
from gpumesh.topology import BackendKind, BackendSpec, GatewaySpec, NodeSpec, Target, Topology
from tests.mesh.servers import Exchange, whole_response

MODEL = "m:latest"
JSON = (("Content-Type", "application/json"),)
QUICK: dict[str, Any] = {
    "tokens_per_s": 1000.0,
    "prefill_tokens_per_s": None,
    "load_s": 0.0,
    "slots": 64,
    "answer_tokens": (40, 40),
}


def host(name: str, *, continues: bool = True, thinking: bool = False, **changes: Any) -> HostProfile:
    model = ModelProfile(MODEL, continues=continues, thinking=thinking, resident=True)
    return profile.make_host(name, **{"models": (model,), **QUICK, **changes})


def node(
    name: str, url: str, *, weight: float = 1.0, kind: BackendKind = BackendKind.OLLAMA, max_parallel: int | None = 64
) -> NodeSpec:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    backend = BackendSpec(kind, (Target(parts.hostname, parts.port),), max_parallel=max_parallel)
    return NodeSpec(name, backend, weight=weight)


@dataclass
class RunningMesh:
    mesh: Mesh
    hosts: dict[str, SimOllama]

    def attempts(self, name: str) -> dict[Outcome, int]:
        return {outcome: count for outcome, count in self.mesh.attempt_outcomes[name].items() if count}

    def in_flight(self) -> int:
        return sum(node.load.in_flight for node in self.mesh.snapshot().nodes)

    def wait_settled(self) -> bool:
        """Every request has ended and no slot is held, here or on a host."""
        counters = self.mesh.request_counters
        return (
            counters.accepted == counters.served + counters.failed + counters.cancelled
            and self.in_flight() == 0
            and all(host.counters.running == 0 for host in self.hosts.values())
        )


@asynccontextmanager
async def mesh_of_nodes(
    *nodes: NodeSpec, hosts: dict[str, SimOllama] | None = None, **gateway: Any
) -> AsyncIterator[RunningMesh]:
    async with Mesh(Topology("test", nodes, GatewaySpec(**gateway))) as mesh:
        await mesh.wait_first_report(10.0)
        yield RunningMesh(mesh, hosts or {})


@asynccontextmanager
async def mesh_of_hosts(
    *profiles: HostProfile, max_parallel: int | None = 64, **gateway: Any
) -> AsyncIterator[RunningMesh]:
    async with AsyncExitStack() as stack:
        hosts = {profile.name: await stack.enter_async_context(SimOllama(profile)) for profile in profiles}
        nodes = [
            node(name, host.url, weight=0.01**index, max_parallel=max_parallel)
            for index, (name, host) in enumerate(hosts.items())
        ]
        yield await stack.enter_async_context(mesh_of_nodes(*nodes, hosts=hosts, **gateway))


def ollama_script(answer: Callable[[Exchange], Awaitable[None]]) -> Callable[[Exchange], Awaitable[None]]:
    """A script for ``servers.serve``: an Ollama with MODEL in memory, as far as probes go; the rest is ``answer``'s."""
    replies = {
        b"GET /api/version": b'{"version":"0.12.6"}',
        b"GET /api/tags": json.dumps({"models": [{"name": MODEL, "model": MODEL}]}).encode(),
        b"GET /api/ps": json.dumps({"models": [{"name": MODEL, "model": MODEL}]}).encode(),
    }

    async def script(exchange: Exchange) -> None:
        reply = replies.get(exchange.head.partition(b" HTTP/")[0])
        if reply is not None:
            await exchange.send(whole_response(reply))
        else:
            await answer(exchange)

    return script


def openai_script(answer: Callable[[Exchange], Awaitable[None]]) -> Callable[[Exchange], Awaitable[None]]:
    """A script for ``servers.serve``: a server of the OpenAI API that lists MODEL, as far as probes go; the rest is
    ``answer``'s."""
    listing = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode()

    async def script(exchange: Exchange) -> None:
        request_line = exchange.head.partition(b" HTTP/")[0]
        if request_line == b"GET /v1/models":
            await exchange.send(whole_response(listing))
        elif request_line.startswith(b"GET "):
            await exchange.send(whole_response(b"{}", status="404 Not Found"))
        else:
            await answer(exchange)

    return script


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Wie groß ist es?"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": "m", "prompt": "Wie groß ist es?"},
    "/v1/chat/completions": {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
}


def make_call(path: str = "/api/chat", **more: Any) -> HttpCall:
    return HttpCall("POST", path, json.dumps({**BODIES.get(path, CHAT), **more}).encode(), JSON)


async def send(
    mesh: Mesh, call: HttpCall, *, timeout_s: float = 20.0, resume: bool = True, node: str | None = None
) -> Answer:
    calls = dict.fromkeys(BackendKind, call)
    return await mesh.send(Demand(model="m", node=node), calls, timeout_s=timeout_s, resume=resume)


def frames(data: bytes) -> list[dict[str, Any]]:
    """Of an NDJSON or SSE body; ``[DONE]`` and comments are left out."""
    lines = [line.removeprefix(b"data: ") for line in data.splitlines() if line.strip() and not line.startswith(b":")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def text_of(data: bytes) -> str:
    texts = []
    for frame in frames(data):
        assert "error" not in frame, frame
        if "message" in frame:
            texts.append(frame["message"]["content"])
        elif "response" in frame:
            texts.append(frame["response"])
        elif frame.get("choices"):
            texts.append(frame["choices"][0]["delta"].get("content") or "")
    return "".join(texts)


def count_final_frames(data: bytes) -> int:
    """How many final frames there are."""
    return data.count(b'"done":true') + data.count(b"data: [DONE]")
