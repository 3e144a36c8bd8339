"""A running pool serves as one more node of its mesh, and leaves it without a failed request."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from gpumesh.errors import ModelMissing, NoNodeError
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.readiness import wait_first_report
from tests.mesh.meshes import host, mesh_of_nodes, node

MESSAGES = "hello"


async def test_a_pool_is_one_more_node_and_no_finding() -> None:
    async with AsyncExitStack() as stack:
        member, server = [await stack.enter_async_context(SimOllama(host(name))) for name in ("a", "pool")]
        async with asyncio.timeout(20), mesh_of_nodes(node("a", member.url)) as running:
            mesh = running.mesh
            pool = replace(node("big", server.url), pool_members=("a",))
            mesh.set_pool_node("big", pool, limit_s=0.0)
            await wait_first_report(mesh.fleet, 10.0)
            state = mesh.snapshot()
            assert [found.name for found in state.nodes] == ["a", "big"]
            assert not [finding for finding in state.findings if finding.nodes]
            assert [spec.name for spec in mesh.file_topology.nodes] == ["a"]
            # A reload keeps it.
            mesh.apply(
                replace(mesh.file_topology, nodes=(replace(mesh.file_topology.nodes[0], weight=2.0),)), limit_s=1
            )
            assert [found.name for found in mesh.snapshot().nodes] == ["a", "big"]
            mesh.set_pool_node("big", None, limit_s=0.0)
            assert [found.name for found in mesh.snapshot().nodes] == ["a"]


async def test_a_model_of_a_pool_that_does_not_serve_is_not_missing() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(SimOllama(host("a")))
        async with asyncio.timeout(20), mesh_of_nodes(node("a", server.url)) as running:
            mesh = running.mesh
            await wait_first_report(mesh.fleet, 10.0)
            mesh.fleet.pools_away = {"big:latest": "the pool duo, which has the model 'big', loads it now"}
            for model in ("big", "big:latest"):
                with pytest.raises(
                    NoNodeError, match="the pool duo, which has the model 'big', loads it now"
                ) as caught:
                    await anext(aiter(mesh.chat(model, MESSAGES)))
                assert not isinstance(caught.value, ModelMissing)
            with pytest.raises(ModelMissing):
                await anext(aiter(mesh.chat("other", MESSAGES)))


async def test_requests_move_to_another_node_when_a_pool_leaves_at_once() -> None:
    slow = host("pool", tokens_per_s=5.0)
    async with AsyncExitStack() as stack:
        member, server = [await stack.enter_async_context(SimOllama(profile)) for profile in (host("a"), slow)]
        async with asyncio.timeout(20), mesh_of_nodes(node("a", member.url, weight=0.001)) as running:
            mesh = running.mesh
            mesh.set_pool_node("big", replace(node("big", server.url), pool_members=("a",)), limit_s=0.0)
            await wait_first_report(mesh.fleet, 10.0)
            stream = mesh.chat("m", MESSAGES, node=None)
            mesh.drain("a")
            iterator = aiter(stream)
            await anext(iterator)
            assert stream.node == "big"
            mesh.resume("a")
            mesh.set_pool_node("big", None, limit_s=0.0)
            async for _ in iterator:
                pass
            assert stream.node == "a"
            assert mesh.request_counters.failed == 0
