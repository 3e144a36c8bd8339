"""Where the load of a stage comes from: this process, or the load generator's own one; and where it is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from gpumesh.bench.load.conditions import Via
from gpumesh.bench.load.generator import Disturbance, run_stage
from gpumesh.bench.load.http.client_apis import ClientApi, api_of_kind, common_api
from gpumesh.bench.load.http.raw_sender import Endpoint
from gpumesh.bench.load.own_process.generator_link import GeneratorProcess
from gpumesh.bench.load.routes import ApiKeys
from gpumesh.bench.load.samples import LoadSample, StageRun
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.bench.workload.stages import Stage
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import UsageError
from gpumesh.state import MeshState, NodeState
from gpumesh.tunnels.local_system.unix_urls import unix_url


class LoadSource(Protocol):
    """Sends the requests of stages. ``via`` is the way that they take."""

    via: Via

    async def run(
        self,
        stage: Stage,
        nodes: Sequence[NodeState],
        state: MeshState,
        *,
        on_record: Callable[[LoadSample], None],
        on_cut_short: Callable[[StageRun], None],
        disturbance: Disturbance | None,
    ) -> StageRun:
        """Runs a stage on these nodes, as in ``generator.run_stage``. ``state`` is the mesh's state before it."""
        ...


class LoadOfThisProcess:
    """The load comes from this process, through ``send``. ``mesh_pid``: the mesh's process, ``None`` if it is this
    one."""

    via = Via.MESH

    def __init__(self, send: SendPrompt, mesh_pid: int | None = None) -> None:
        self._send = send
        self._mesh_pid = mesh_pid

    async def run(
        self,
        stage: Stage,
        nodes: Sequence[NodeState],  # noqa: ARG002 - the mesh knows its nodes
        state: MeshState,  # noqa: ARG002
        *,
        on_record: Callable[[LoadSample], None],
        on_cut_short: Callable[[StageRun], None],
        disturbance: Disturbance | None,
    ) -> StageRun:
        return await run_stage(
            self._send,
            stage,
            on_record=on_record,
            on_cut_short=on_cut_short,
            disturbance=disturbance,
            mesh_pid=self._mesh_pid,
        )


class LoadOfGenerator:
    """The load comes from the load generator's own process. ``via`` is GATEWAY or DIRECT."""

    def __init__(self, process: GeneratorProcess, via: Via, keys: ApiKeys, mesh_pid: int | None) -> None:
        self.via = via
        self._process = process
        self._keys = keys
        self._mesh_pid = mesh_pid

    async def run(
        self,
        stage: Stage,
        nodes: Sequence[NodeState],
        state: MeshState,
        *,
        on_record: Callable[[LoadSample], None],
        on_cut_short: Callable[[StageRun], None],
        disturbance: Disturbance | None,
    ) -> StageRun:
        if self.via is Via.GATEWAY:
            endpoints = gateway_endpoints(nodes, state.gateway.url, self._keys.gateway)
        else:
            endpoints = node_endpoints(nodes, self._keys)
        return await self._process.run_stage(
            stage,
            endpoints,
            self.via,
            on_record=on_record,
            on_cut_short=on_cut_short,
            disturbance=disturbance,
            mesh_pid=self._mesh_pid,
        )


class LoadOnUrl:
    """The load of the load generator's own process, on a server that belongs to no mesh."""

    via = Via.URL

    def __init__(self, process: GeneratorProcess, url: str, api: ClientApi, api_key: str | None) -> None:
        self._process = process
        self._endpoints = (Endpoint(url, api, api_key=api_key),)

    async def run(
        self,
        stage: Stage,
        nodes: Sequence[NodeState],  # noqa: ARG002 - there is one server
        state: MeshState,  # noqa: ARG002
        *,
        on_record: Callable[[LoadSample], None],
        on_cut_short: Callable[[StageRun], None],
        disturbance: Disturbance | None,
    ) -> StageRun:
        return await self._process.run_stage(
            stage, self._endpoints, self.via, on_record=on_record, on_cut_short=on_cut_short, disturbance=disturbance
        )


def gateway_endpoints(nodes: Sequence[NodeState], url: str | None, api_key: str | None) -> tuple[Endpoint, ...]:
    """The gateway, for each of these nodes and for all together: the first endpoint lets the mesh choose.

    A node is asked in the API of its kind, whose answers have the server's own counters; all nodes together in an API
    that each of them has. Raises UsageError if the mesh has no gateway.
    """
    if url is None:
        raise UsageError("the mesh has no gateway", hint="add `--via mesh`, or start it without --no-gateway")
    base_url = _base_url(url)
    common = Endpoint(
        base_url, common_api(frozenset(node.backend.kind for node in nodes)), through_gateway=True, api_key=api_key
    )
    pinned = [
        Endpoint(base_url, api_of_kind(node.backend.kind), node.name, through_gateway=True, api_key=api_key)
        for node in nodes
    ]
    return (common, *pinned)


def node_endpoints(nodes: Sequence[NodeState], keys: ApiKeys) -> tuple[Endpoint, ...]:
    """The local port of each node's tunnel."""
    return tuple(
        Endpoint(
            _base_url(node.backend.url),
            api_of_kind(node.backend.kind),
            node.name,
            api_key=keys.nodes.get(node.name),
        )
        for node in nodes
        if node.backend.url is not None
    )


def _base_url(url: str) -> str:
    """The URL as an HTTP client has it: that of a Unix socket is written ``unix:PATH`` in a mesh's state."""
    return unix_url(Path(url.removeprefix(UNIX_PREFIX))) if url.startswith(UNIX_PREFIX) else url
