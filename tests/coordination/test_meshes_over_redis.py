"""Two meshes share the slots of a node over a real Redis, and a mesh whose Redis is not there serves."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.chat import ChatStream
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import BackendSpec, NodeSpec, RedisSpec, Target, Topology
from tests.coordination.redis_server import redis_server
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]


async def read(stream: ChatStream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def test_two_meshes_over_one_gpu_share_its_slots(tmp_path: Path) -> None:
    """With one slot on the node, the second mesh's request waits for the first one's."""
    slow = profile.make_host("one", tokens_per_s=50.0, load_s=0.0, answer_tokens=(60, 60))
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(tmp_path))
        server = await stack.enter_async_context(SimOllama(slow))
        spec = NodeSpec("one", BackendSpec(targets=(Target("127.0.0.1", server.port),), max_parallel=1))
        topology = Topology("shared", (spec,), redis=RedisSpec(redis.url))
        meshes = [await stack.enter_async_context(Mesh(topology)) for _ in range(2)]
        for mesh in meshes:
            await mesh.wait_first_report(20.0)
        first = meshes[0].chat("qwen2.5:7b", "hello")
        await anext(first)
        second = asyncio.create_task(read(meshes[1].chat("qwen2.5:7b", "hello again")))
        await wait_until(lambda: meshes[1].snapshot().gateway.queued == 1, "it waits")
        await read(first)
        assert await second
        assert server.counters.max_in_flight == 1


async def test_without_redis_a_mesh_serves_and_has_a_finding(tmp_path: Path) -> None:
    async with SimOllama(profile.make_instant_host("one")) as server:
        spec = NodeSpec("one", BackendSpec(targets=(Target("127.0.0.1", server.port),)))
        topology = Topology("alone", (spec,), redis=RedisSpec(f"unix://{tmp_path / 'nobody.sock'}"))
        async with Mesh(topology) as mesh:
            await mesh.wait_first_report(20.0)
            assert await read(mesh.chat("qwen2.5:7b", "hello"))
            await wait_until(
                lambda: "redis-away" in [finding.code for finding in mesh.snapshot().findings], "the finding is there"
            )
