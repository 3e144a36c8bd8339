"""The stores of nodes as a command reaches them, against simulated servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from gpumesh.errors import BackendError, BackendUnreachable, UsageError
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, QWEN_7B, Faults
from gpumesh.mesh.models.inventory import ModelTask
from gpumesh.mesh.models.model_store import ModelStore
from gpumesh.mesh.models.store_answers import StoreStep
from gpumesh.mesh.models.url_stores import (
    MAX_CONCURRENT_SHOWS,
    TaskResult,
    UrlStores,
    open_url_stores,
    perform_tasks,
)
from gpumesh.state import BackendPhase, BackendState, NodeState
from gpumesh.topology import BackendSpec, NodeSpec, Target, Topology
from tests.cli.states import healthy, mesh
from tests.mesh.servers import Exchange, serve


@dataclass
class Fixture:
    server: SimOllama
    stores: UrlStores
    node: NodeState

    @property
    def store(self) -> ModelStore:
        return self.stores.of(self.node)

    async def refreshed(self) -> NodeState:
        (node,) = (await self.stores.refresh_backends(mesh(self.node))).nodes
        return node

    async def loaded(self) -> list[str]:
        return [model.name for model in (await self.refreshed()).backend.loaded]


@pytest.fixture
async def alpha() -> AsyncIterator[Fixture]:
    host = profile.make_host("alpha", models=(QWEN_7B, EMBEDDER), load_s=0.0, pull_s=0.1)
    async with SimOllama(host) as server:
        backend = BackendSpec(targets=(Target("127.0.0.1", server.port),))
        topology = Topology("t", (NodeSpec("alpha", backend),))
        node = replace(healthy("alpha"), backend=BackendState("ollama", BackendPhase.UP, url=server.url))
        async with open_url_stores(topology) as stores:
            yield Fixture(server, stores, node)


async def test_a_refreshed_backend_is_as_it_is_now(alpha: Fixture) -> None:
    node = await alpha.refreshed()
    assert node.backend.models == ("qwen2.5:7b", "nomic-embed-text:latest")
    assert node.name == "alpha"
    await alpha.store.remove("qwen2.5:7b")
    assert (await alpha.refreshed()).backend.models == ("nomic-embed-text:latest",)


async def test_a_node_that_is_not_in_the_file_is_asked_too(alpha: Fixture) -> None:
    """The node of a running pool."""
    pool = replace(alpha.node, name="big", pool_members=("alpha",))
    _, refreshed = (await alpha.stores.refresh_backends(mesh(alpha.node, pool))).nodes
    assert refreshed.backend.models == ("qwen2.5:7b", "nomic-embed-text:latest")
    assert await alpha.stores.of(pool).context_length("qwen2.5:7b") is not None


async def test_a_server_that_is_gone_by_now_is_as_the_mesh_saw_it(alpha: Fixture) -> None:
    await alpha.server.set_faults(Faults(refuse=True))
    assert await alpha.refreshed() == alpha.node


async def test_a_pull_yields_its_steps(alpha: Fixture) -> None:
    steps = [step async for step in alpha.store.pull("phi4:latest")]
    assert steps[0] == StoreStep("pulling manifest")
    sizes = [(step.completed_bytes, step.total_bytes) for step in steps if step.total_bytes is not None]
    assert sizes[0][0] == 0
    assert sizes[-1][0] == sizes[-1][1] == sizes[0][1]
    assert steps[-1] == StoreStep("success")
    assert repr(alpha.store) == "<ModelStore alpha>"


async def test_a_pull_that_fails_or_is_cut(alpha: Fixture) -> None:
    with pytest.raises(BackendError, match="file does not exist") as caught:
        _ = [step async for step in alpha.store.pull("missing")]
    assert caught.value.node == "alpha"
    assert "library" in str(caught.value.hint)
    await alpha.server.set_faults(Faults(status=503, paths=("/api/pull",)))
    with pytest.raises(BackendError):
        _ = [step async for step in alpha.store.pull("phi4")]
    await alpha.server.set_faults(Faults(disconnect=True, paths=("/api/pull",)))
    with pytest.raises(BackendUnreachable, match="no answer"):
        _ = [step async for step in alpha.store.pull("phi4")]


async def test_load_and_unload_of_both_kinds_of_model(alpha: Fixture) -> None:
    await alpha.store.load("qwen2.5:7b", embedder=False, keep_alive="30m")
    await alpha.store.load("nomic-embed-text", embedder=True, keep_alive=None)
    assert sorted(await alpha.loaded()) == ["nomic-embed-text:latest", "qwen2.5:7b"]
    await alpha.store.unload("qwen2.5:7b", embedder=False)
    await alpha.store.unload("nomic-embed-text", embedder=True)
    assert await alpha.loaded() == []
    with pytest.raises(BackendError, match="not found"):
        await alpha.store.load("nope", embedder=False, keep_alive=None)


async def test_the_context_length_is_the_models_own_or_not_known(alpha: Fixture) -> None:
    assert await alpha.store.context_length("qwen2.5:7b") == 32768
    assert await alpha.store.context_length("nope") is None
    await alpha.server.set_faults(Faults(status=500))
    assert await alpha.store.context_length("qwen2.5:7b") is None


async def test_a_list_of_thousands_is_asked_about_a_few_at_a_time_and_only_so_long(
    alpha: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        topology = Topology("t", tuple(NodeSpec(name, BackendSpec()) for name in ("slow", "alpha")))
        async with open_url_stores(topology) as stores:
            asked = [(slow, f"many-{number}") for number in range(3000)] + [(alpha.node, QWEN_7B.name)]
            # A second is enough, but for a machine that does other work. Only such a machine gets the longer time.
            for timeout_s in (1.0, 15.0):
                monkeypatch.setattr("gpumesh.mesh.models.url_stores.CONTEXT_LENGTHS_TIMEOUT_S", timeout_s)
                if lengths := await stores.context_lengths(asked):
                    break
    assert set(lengths) == {("alpha", QWEN_7B.name)}
    assert most <= 2 * MAX_CONCURRENT_SHOWS


async def test_a_task_that_fails_does_not_stop_the_others() -> None:
    tasks = [ModelTask(healthy(node), model) for node in ("a", "b") for model in ("x", "y")]
    results: list[TaskResult] = []

    async def perform(task: ModelTask) -> None:
        if (task.node.name, task.model) == ("a", "x"):
            raise BackendError("no space left", node="a")

    await perform_tasks(tasks, perform, results.append)
    outcomes = {(result.task.node.name, result.task.model): result.error for result in results}
    assert [str(outcomes.pop(("a", "x")))] == ["no space left"]
    assert outcomes == {("a", "y"): None, ("b", "x"): None, ("b", "y"): None}


async def test_a_mistake_of_the_caller_is_raised() -> None:
    async def perform(task: ModelTask) -> None:
        raise UsageError("no")

    with pytest.raises(UsageError):
        await perform_tasks([ModelTask(healthy("a"), "x")], perform, lambda _: None)
