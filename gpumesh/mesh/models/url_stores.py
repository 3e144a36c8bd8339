"""The model stores of all nodes for a command (`gpumesh models`), which reaches them over the forwarded ports.

The mesh may run in another process. So the command knows only each node's state, which has the URL of its server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gpumesh import config
from gpumesh.errors import GPUMeshError, UsageError
from gpumesh.mesh.models.inventory import ModelTask
from gpumesh.mesh.models.model_store import SHOW_TIMEOUT_S, ModelStore, over_url
from gpumesh.state import BackendPhase, MeshState, NodeState
from gpumesh.topology import BackendKind, BackendSpec

if TYPE_CHECKING:
    import httpx

    from gpumesh.topology import Topology

READ_TIMEOUT_S = 600.0  # the longest wait for the next line of progress, or for a load from a slow disk
MAX_CONCURRENT_SHOWS = 8  # requests for a context length (``/api/show``) to one node at a time
CONTEXT_LENGTHS_TIMEOUT_S = 5.0  # for all models together; a context length that comes later stays unknown


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How a task ended. ``error`` is ``None`` for a task that has succeeded."""

    task: ModelTask
    error: GPUMeshError | None = None


class UrlStores:
    """The model stores of all nodes of ``topology``. The caller closes ``client``."""

    def __init__(self, client: httpx.AsyncClient, topology: Topology) -> None:
        self._client = client
        self._topology = topology

    def of(self, node: NodeState) -> ModelStore:
        """The model store of a node, whose server must be up."""
        api_key_env = self._backend_spec(node).api_key_env
        url = node.backend.url or ""  # a server that is up has a URL
        return ModelStore(node.name, over_url(self._client, url, node=node.name, api_key_env=api_key_env))

    def _backend_spec(self, node: NodeState) -> BackendSpec:
        """What mesh.yaml says of the node's server. It does not have the node of a running pool, which needs no key."""
        try:
            return self._topology.node(node.name).backend
        except KeyError:
            return BackendSpec(BackendKind(node.backend.kind))

    async def refresh_backends(self, state: MeshState) -> MeshState:
        """Probes the servers that are up, and returns the state with what they say about their models now. The mesh's
        own probe may be some seconds old, and not show the effect of the previous command."""
        nodes = await asyncio.gather(*(self._refresh_backend(node) for node in state.nodes))
        return replace(state, at=datetime.now(UTC), nodes=tuple(nodes))

    async def _refresh_backend(self, node: NodeState) -> NodeState:
        """The node's state with a new report on its server. If the server is down, or does not answer this probe, the
        state as it is."""
        from gpumesh.probes.backend import probe_backend

        if node.backend.state is not BackendPhase.UP or node.backend.url is None:
            return node
        spec = self._backend_spec(node)
        key = None if spec.api_key_env is None else config.read_secret(spec.api_key_env, node=node.name)
        report = await probe_backend(
            self._client, spec, [node.backend.url], api_key=key, timeout_s=SHOW_TIMEOUT_S, node=node.name
        )
        return replace(node, backend=report.state) if report.state.state is BackendPhase.UP else node

    async def context_lengths(self, models: Sequence[tuple[NodeState, str]]) -> dict[tuple[str, str], int]:
        """The context lengths in tokens, by the names of node and model. Lengths that the servers do not say in time
        are left out. Each node gets up to ``MAX_CONCURRENT_SHOWS`` requests at a time, whatever the others do. So a
        node that is slow or lists thousands of models does not delay the other nodes."""
        semaphores = {node.name: asyncio.Semaphore(MAX_CONCURRENT_SHOWS) for node, _ in models}
        lengths: dict[tuple[str, str], int] = {}

        async def ask(node: NodeState, model: str) -> None:
            """Asks one node for the length of one model, when this node's limit allows it."""
            async with semaphores[node.name]:
                length = await self.of(node).context_length(model)
            if length:
                lengths[node.name, model] = length

        tasks = [asyncio.create_task(ask(node, model)) for node, model in models]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=CONTEXT_LENGTHS_TIMEOUT_S)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            # The result of a cancelled task is a CancelledError, which is a BaseException, but no Exception. A server's
            # faults give no length. So an Exception is another mistake: a missing API key, for example.
            if isinstance(result, Exception):
                raise result
        return lengths


async def perform_tasks(
    tasks: Sequence[ModelTask],
    perform: Callable[[ModelTask], Awaitable[None]],
    on_result: Callable[[TaskResult], None],
) -> None:
    """Performs the tasks of each node one after the other, and the tasks of different nodes at the same time. Calls
    ``on_result`` after each task. A task that fails does not stop the others.

    A UsageError of ``perform`` is raised, because it is a mistake in the command, not of a node.
    """

    async def perform_on(node: str) -> None:
        """Performs the tasks of one node."""
        for task in tasks:
            if task.node.name != node:
                continue
            try:
                await perform(task)
            except UsageError:  # a GPUMeshError too, but no fault of this node
                raise
            except GPUMeshError as error:
                on_result(TaskResult(task, error))
            else:
                on_result(TaskResult(task))

    node_names = dict.fromkeys(task.node.name for task in tasks)
    await asyncio.gather(*(perform_on(name) for name in node_names))


@asynccontextmanager
async def open_url_stores(topology: Topology) -> AsyncIterator[UrlStores]:
    """Yields the model stores of all nodes, with an HTTP client that is closed at the end."""
    import httpx

    from gpumesh.probes.http_client import make_http_client

    timeout = httpx.Timeout(30.0, read=READ_TIMEOUT_S)  # 30 s to connect, and for each write
    async with make_http_client(timeout=timeout) as client:
        yield UrlStores(client, topology)
