"""Which missing copies are loaded where, and that a real mesh loads them on simulated servers."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults, ModelProfile, make_host
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.placement import ModelPlacement, NextLoad, PlacementNode, find_next_load
from gpumesh.topology import ModelSpec, Topology
from tests.mesh.meshes import node
from tests.tunnels.polling import wait_until

A, B = "a:8b", "b:8b"


def idle(name: str, *, loaded: tuple[str, ...] = (), **values: Any) -> PlacementNode:
    """An idle node with both models on its disk, and room for one in its memory."""
    pushed_out = {model: loaded for model in (A, B) if model not in loaded}
    return PlacementNode(name, True, frozenset({A, B}), frozenset(loaded), pushed_out=pushed_out, **values)


def wants(model: str = A, copies: int | None = 1, **values: Any) -> ModelSpec:
    return ModelSpec(model, wanted_copies=copies, **values)


def test_a_missing_copy_is_loaded_on_an_idle_node() -> None:
    assert find_next_load([wants()], [idle("x")]) == NextLoad(A, "x", 0, 1)


def test_nothing_is_loaded_where_enough_copies_are_in_memory_or_none_are_wanted() -> None:
    nodes = [idle("x", loaded=(A,)), idle("y")]
    assert find_next_load([wants()], nodes) is None
    assert find_next_load([wants(B, None)], nodes) is None
    assert find_next_load([wants(copies=2)], nodes) == NextLoad(A, "y", 1, 2)


@pytest.mark.parametrize(
    "busy",
    [
        replace(idle("x"), is_idle=False),
        replace(idle("x"), models=frozenset({B})),
        replace(idle("x"), failed=frozenset({A})),
    ],
)
def test_a_busy_node_one_without_the_model_and_one_where_it_failed_are_left_alone(busy: PlacementNode) -> None:
    assert find_next_load([wants()], [busy]) is None
    assert find_next_load([wants()], [busy, idle("y")]) == NextLoad(A, "y", 0, 1)


def test_only_allowed_nodes_count_and_are_used() -> None:
    nodes = [idle("x", loaded=(A,)), idle("y")]
    assert find_next_load([wants(nodes=("y",))], nodes) == NextLoad(A, "y", 0, 1)


def test_preferred_nodes_come_first_then_low_tiers_then_empty_nodes() -> None:
    nodes = [idle("second", tier=2), idle("full", loaded=(B,)), idle("empty")]
    assert find_next_load([wants()], nodes) == NextLoad(A, "empty", 0, 1)
    assert find_next_load([wants()], nodes[:2]) == NextLoad(A, "full", 0, 1, (B,))
    assert find_next_load([wants(prefer=("second",))], nodes) == NextLoad(A, "second", 0, 1)


def test_a_pinned_model_is_never_pushed_out() -> None:
    nodes = [idle("x", loaded=(B,)), idle("y", loaded=(B,))]
    assert find_next_load([wants(), wants(B, pinned=True)], nodes) is None


def test_a_wanted_copy_is_pushed_out_only_if_there_are_more_than_wanted() -> None:
    nodes = [idle("x", loaded=(B,)), idle("y", loaded=(B,))]
    assert find_next_load([wants(), wants(B, 2)], nodes) is None
    assert find_next_load([wants(), wants(B, 1)], nodes) == NextLoad(A, "x", 0, 1, (B,))


def test_a_model_that_was_used_lately_is_not_pushed_out() -> None:
    nodes = [idle("x", loaded=(B,), used=frozenset({B}))]
    assert find_next_load([wants()], nodes) is None


def test_a_copy_gets_the_first_step_of_the_models_contexts() -> None:
    assert find_next_load([wants(context_steps=(4096, 16384))], [idle("x")]) == NextLoad(A, "x", 0, 1, context=4096)


def test_pinned_models_come_first() -> None:
    assert find_next_load([wants(), wants(B, pinned=True)], [idle("x")]) == NextLoad(B, "x", 0, 1)


def test_names_without_a_tag_are_the_same_model() -> None:
    seen = PlacementNode("x", True, frozenset({"m", "m:latest"}), frozenset({"m:latest"}))
    assert find_next_load([wants("m")], [seen]) is None
    assert find_next_load([wants("m")], [replace(seen, loaded=frozenset())]) == NextLoad("m", "x", 0, 1)


# -- with simulated servers ------------------------------------------------------------------------------------------


async def lab(stack: AsyncExitStack, *names: str, **changes: Any) -> dict[str, SimOllama]:
    models = (ModelProfile(A), ModelProfile(B), ModelProfile("nomic-embed-text:latest", 262, embedding=True))
    profiles = [make_host(name, models=models, load_s=0.05, max_loaded=1, **changes) for name in names]
    return {profile.name: await stack.enter_async_context(SimOllama(profile)) for profile in profiles}


async def start(stack: AsyncExitStack, servers: dict[str, SimOllama], *specs: ModelSpec) -> tuple[Mesh, ModelPlacement]:
    nodes = tuple(node(name, server.url) for name, server in servers.items())
    mesh = await stack.enter_async_context(Mesh(Topology("test", nodes, models=specs)))
    placement = ModelPlacement(mesh, clock=time.monotonic)
    task = asyncio.create_task(placement.run(interval_s=0.1))
    stack.callback(task.cancel)
    return mesh, placement


def count_loaded(mesh: Mesh, model: str) -> int:
    return sum(model in {item.name for item in state.backend.loaded} for state in mesh.snapshot().nodes)


async def test_a_mesh_loads_what_is_wanted_and_then_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gpumesh.mesh.models.placement")
    async with AsyncExitStack() as stack:
        servers = await lab(stack, "x", "y", "z")
        mesh, _ = await start(stack, servers, wants(A, 2), wants(B, 1, pinned=True))
        await wait_until(lambda: count_loaded(mesh, A) == 2 and count_loaded(mesh, B) == 1, "all are loaded")
        await asyncio.sleep(0.5)
    lines = [record.getMessage() for record in caplog.records if record.name == "gpumesh.mesh.models.placement"]
    assert len(lines) == 3, lines
    assert lines[0] == f"loading {B}: mesh.yaml wants 1 in memory, there are 0"


async def test_an_embedding_model_is_loaded_too() -> None:
    async with AsyncExitStack() as stack:
        mesh, _ = await start(stack, await lab(stack, "x"), wants("nomic-embed-text", 1))
        await wait_until(lambda: count_loaded(mesh, "nomic-embed-text:latest") == 1, "it is loaded")


async def test_a_request_for_the_first_step_finds_the_copy_in_memory() -> None:
    async with AsyncExitStack() as stack:
        servers = await lab(stack, "x")
        mesh, _ = await start(stack, servers, wants(A, 1, context_steps=(8192,)))
        await wait_until(lambda: count_loaded(mesh, A) == 1, "it is loaded")
        (loaded,) = mesh.snapshot().nodes[0].backend.loaded
        assert loaded.context_length == 8192
        request = ChatRequest(A, (Message("user", "Why?"),), options={"num_ctx": 8192})
        async with mesh.chat(request) as stream:
            assert [chunk async for chunk in stream]
        assert servers["x"].counters.loads == 1


async def test_nothing_is_loaded_on_a_busy_node() -> None:
    async with AsyncExitStack() as stack:
        servers = await lab(stack, "x", tokens_per_s=50.0, answer_tokens=(100, 100))
        mesh, _ = await start(stack, servers, wants(B, 1))
        await wait_until(lambda: count_loaded(mesh, B) == 1, "it is loaded")
        async with mesh.chat(A, "Why?") as stream:
            seen = [chunk async for chunk in stream]
            assert seen
        await asyncio.sleep(0.5)
        assert count_loaded(mesh, B) == 0, "the other model was used a moment ago"


async def test_a_load_that_fails_is_not_repeated_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncExitStack() as stack:
        servers = await lab(stack, "x")
        await servers["x"].set_faults(Faults(status=500, paths=("/api/generate",)))
        mesh, placement = await start(stack, servers, wants())
        await wait_until(lambda: bool(placement._failed_until), "the load has failed")
        await asyncio.sleep(0.5)
        assert count_loaded(mesh, A) == 0
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len([record for record in warnings if "could not load" in record.getMessage()]) == 1
