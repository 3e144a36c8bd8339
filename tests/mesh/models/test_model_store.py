from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given

from gpumesh.cli.views.download_bars import format_step
from gpumesh.errors import BackendError, BackendUnreachable
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, QWEN_7B, Faults
from gpumesh.mesh.models.model_store import (
    MAX_CONCURRENT_SHOWS,
    ModelStoreClient,
    PullProgress,
    open_model_stores,
    parse_context_length,
    parse_line,
    parse_progress,
)
from gpumesh.state import BackendPhase, BackendState, NodeState
from gpumesh.topology import BackendSpec, NodeSpec, Target, Topology
from tests.absurd import ABSURD, DEEP, json_bytes
from tests.cli.states import healthy, mesh
from tests.mesh.servers import Exchange, serve


@dataclass
class Fixture:
    server: SimOllama
    stores: ModelStoreClient
    node: NodeState

    async def loaded(self) -> list[str]:
        (node,) = (await self.stores.refresh_backends(mesh(self.node))).nodes
        return [model.name for model in node.backend.loaded]


@pytest.fixture
async def one() -> AsyncIterator[Fixture]:
    host = profile.make_host("one", models=(QWEN_7B, EMBEDDER), load_s=0.0, pull_s=0.1)
    async with SimOllama(host) as server:
        backend = BackendSpec(targets=(Target("127.0.0.1", server.port),))
        topology = Topology("t", (NodeSpec("one", backend),))
        node = replace(healthy("one"), backend=BackendState("ollama", BackendPhase.UP, url=server.url))
        async with open_model_stores(topology) as stores:
            yield Fixture(server, stores, node)


async def test_a_look_is_fresh(one: Fixture) -> None:
    (node,) = (await one.stores.refresh_backends(mesh(one.node))).nodes
    assert node.backend.models == ("qwen2.5:7b", "nomic-embed-text:latest")
    assert node.name == "one"
    await one.stores.remove(one.node, "qwen2.5:7b")
    (node,) = (await one.stores.refresh_backends(mesh(one.node))).nodes
    assert node.backend.models == ("nomic-embed-text:latest",)


async def test_a_server_that_is_gone_by_now_is_as_the_mesh_saw_it(one: Fixture) -> None:
    await one.server.set_faults(Faults(refuse=True))
    assert (await one.stores.refresh_backends(mesh(one.node))).nodes == (one.node,)


async def test_pull_tells_its_steps(one: Fixture) -> None:
    steps = [step async for step in one.stores.pull(one.node, "phi4:latest")]
    assert steps[0] == PullProgress("pulling manifest")
    sizes = [(step.completed_bytes, step.total_bytes) for step in steps if step.total_bytes is not None]
    assert sizes[0][0] == 0
    assert sizes[-1][0] == sizes[-1][1] == sizes[0][1]
    assert steps[-1] == PullProgress("success")


async def test_a_pull_that_fails_or_is_cut(one: Fixture) -> None:
    with pytest.raises(BackendError, match="file does not exist") as caught:
        _ = [step async for step in one.stores.pull(one.node, "missing")]
    assert caught.value.node == "one"
    assert "library" in str(caught.value.hint)
    await one.server.set_faults(Faults(status=503, paths=("/api/pull",)))
    with pytest.raises(BackendError):
        _ = [step async for step in one.stores.pull(one.node, "phi4")]
    await one.server.set_faults(Faults(disconnect=True, paths=("/api/pull",)))
    with pytest.raises(BackendUnreachable, match="no answer"):
        _ = [step async for step in one.stores.pull(one.node, "phi4")]


async def test_load_and_unload_of_both_kinds(one: Fixture) -> None:
    await one.stores.load(one.node, "qwen2.5:7b", embedder=False, keep_alive="30m")
    await one.stores.load(one.node, "nomic-embed-text", embedder=True, keep_alive=None)
    assert sorted(await one.loaded()) == ["nomic-embed-text:latest", "qwen2.5:7b"]
    await one.stores.unload(one.node, "qwen2.5:7b", embedder=False)
    await one.stores.unload(one.node, "nomic-embed-text", embedder=True)
    assert await one.loaded() == []
    with pytest.raises(BackendError, match="not found"):
        await one.stores.load(one.node, "nope", embedder=False, keep_alive=None)


async def test_the_context_is_the_models_own_or_not_known(one: Fixture) -> None:
    assert await one.stores.context_length(one.node, "qwen2.5:7b") == 32768
    assert await one.stores.context_length(one.node, "nope") is None
    await one.server.set_faults(Faults(status=500))
    assert await one.stores.context_length(one.node, "qwen2.5:7b") is None


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (b'{"error": "\\u001b[31mno space left on device"}', 200, "no space left on device"),
        (b"<html>nope</html>", 502, "<html>nope</html>"),
        (b"[]", 500, "status 500"),
        (b'{"error": {"a": 1}}', 200, "{'a': 1}"),
    ],
)
def test_lines_that_tell_of_an_error(line: bytes, status: int, said: str) -> None:
    with pytest.raises(BackendError) as caught:
        parse_line(line, status, "one")
    assert caught.value.message == said


def test_a_full_disk_says_what_to_do() -> None:
    with pytest.raises(BackendError) as caught:
        parse_line(b'{"error": "write /root/.ollama/x: no space left on device"}', 200, "one")
    assert "its disk is full" in str(caught.value.hint)


@pytest.mark.parametrize("line", [b"", b" \r", b"not json", b"[1]", b"5", b"[" * 100_000])
def test_lines_that_say_nothing(line: bytes) -> None:
    assert parse_line(line, 200, "one") == {}


def test_steps() -> None:
    assert parse_progress({"status": "pulling", "total": 10, "completed": 4}) == PullProgress("pulling", 4, 10)
    assert parse_progress({"status": "pulling", "total": 10}) == PullProgress("pulling", 0, 10)
    assert parse_progress({"status": "pulling", "total": 0, "completed": 0}) == PullProgress("pulling")
    assert parse_progress({"status": "a\x1b[2Jb", "total": "x"}) == PullProgress("ab")
    assert parse_progress({"status": 1}) is None


def test_contexts() -> None:
    assert parse_context_length({"model_info": {"qwen2.context_length": 32768, "general.name": "x"}}) == 32768
    assert parse_context_length({"model_info": {"a.context_length": True, "b.context_length": "x"}}) is None
    assert parse_context_length({"model_info": None}) is None


@given(ABSURD)
@example({"status": "pulling", "total": 1, "completed": 10**400})
@example({"status": "pulling", "total": 10**400, "completed": 10**400})
@example({"status": "pulling", "total": True, "completed": False})
@example({"error": DEEP})
@example({"model_info": {"x.context_length": 10**400}})
def test_no_line_of_a_server_raises_but_as_its_error(document: Any) -> None:
    try:
        entry = parse_line(json_bytes(document), 200, "one")
    except BackendError as error:
        assert error.message.isprintable()
        return
    step = parse_progress(entry)
    if step is not None:
        assert format_step(step).isprintable()
    length = parse_context_length(entry)
    assert length is None or 0 < length <= 1 << 31


async def test_a_list_of_thousands_is_asked_about_a_few_at_a_time_and_only_so_long(
    one: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumesh.mesh.models.model_store.CONTEXT_LENGTHS_TIMEOUT_S", 1.0)
    open_now, most = 0, 0

    async def script(exchange: Exchange) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        try:
            await exchange.wait_client_gone()
        finally:
            open_now -= 1
            exchange.closed = True

    async with serve(script) as server:
        slow = replace(healthy("slow"), backend=BackendState("ollama", BackendPhase.UP, url=server.url))
        topology = Topology("t", tuple(NodeSpec(name, BackendSpec()) for name in ("slow", "one")))
        async with open_model_stores(topology) as stores:
            asked = [(slow, f"many-{number}") for number in range(3000)] + [(one.node, QWEN_7B.name)]
            found = await stores.context_lengths(asked)
    assert set(found) == {("one", QWEN_7B.name)}
    assert most <= 2 * MAX_CONCURRENT_SHOWS
