"""What `audit` asks beyond what a mesh asks all the time: each way to each server by itself, and the room on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gpumesh import audit
from gpumesh.async_iterators import closing_iterator
from gpumesh.errors import ConnectTimeout, GPUMeshError, SecretMissing
from gpumesh.state import MeshState, NodeState, TunnelPhase
from gpumesh.topology import NodeSpec, Topology

if TYPE_CHECKING:
    import httpx

    from gpumesh.daemon.sessions.session import Session

# All of it stays within the 10 s that a command may take when a node is ill: those that are well are looked at while
# the ill ones are still being waited for.
EARLY_REPORT_S = 3.0
REPORT_DEADLINE_S = 7.0
ROUTES_S = 2.5
LATE_ROUTES_S = 1.0
MAX_DISK_OUTPUT_BYTES = 1 << 16


async def inspect_mesh(session: Session, topology: Topology) -> MeshState:
    """The mesh's state with routes and disks filled in, and the findings by this mesh.yaml."""
    from gpumesh.probes.http_client import http_client

    loop = asyncio.get_running_loop()
    began = loop.time()
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled}
    async with http_client(timeout=ROUTES_S) as client:
        state = await session.wait_first_report(EARLY_REPORT_S)
        closer = await _each(session, client, specs, state.nodes, ROUTES_S)
        state = await session.wait_first_report(max(began + REPORT_DEADLINE_S - loop.time(), 0.1))
        late = [node for node in state.nodes if node.name not in closer]
        closer |= await _each(session, client, specs, late, LATE_ROUTES_S)
    nodes = tuple(_settled(_with(node, closer.get(node.name))) for node in state.nodes)
    return replace(state, nodes=nodes, findings=audit.collect_findings(topology, nodes))


def _with(node: NodeState, closer: NodeState | None) -> NodeState:
    """The later state, with what was learned about an earlier one if its ways are still the same."""
    if closer is None or [route.url for route in node.routes] != [
        route.url for route in closer.routes if not route.offered
    ]:
        return node
    host = replace(node.host, store_free_mib=closer.host.store_free_mib)
    return replace(node, host=host, routes=closer.routes)


def _settled(node: NodeState) -> NodeState:
    """A host that has not answered by now is not there for whoever asks now, however long it may be waited for."""
    tunnel = node.tunnel
    if tunnel.state is not TunnelPhase.CONNECTING or tunnel.last_error is not None:
        return node
    message = f"no connection within {REPORT_DEADLINE_S:g} s"
    return replace(node, tunnel=replace(tunnel, last_error=message, error_code=ConnectTimeout.code))


async def _each(
    session: Session,
    client: httpx.AsyncClient,
    specs: dict[str, NodeSpec],
    nodes: Sequence[NodeState],
    timeout_s: float,
) -> dict[str, NodeState]:
    up = [node for node in nodes if node.tunnel.state is TunnelPhase.UP and node.name in specs]
    looked = await asyncio.gather(*(_one(session, client, specs[node.name], node, timeout_s) for node in up))
    return {node.name: node for node in looked}


async def _one(
    session: Session, client: httpx.AsyncClient, spec: NodeSpec, node: NodeState, timeout_s: float
) -> NodeState:
    from gpumesh import config
    from gpumesh.probes.routes import probe_routes

    variable = spec.backend.api_key_env
    try:
        key = None if variable is None else config.read_secret(variable, node=spec.name)
    except SecretMissing:
        return node  # that is a finding of its own
    routes, free = await asyncio.gather(
        probe_routes(client, spec, node, api_key=key, timeout_s=timeout_s), _free_mib(session, node, timeout_s)
    )
    return replace(node, routes=routes, host=replace(node.host, store_free_mib=free))


async def _free_mib(session: Session, node: NodeState, timeout_s: float) -> int | None:
    from gpumesh.probes.disk_space import FREE_SPACE_COMMAND, read_free_mib

    said = bytearray()
    try:
        async with asyncio.timeout(timeout_s), closing_iterator(session.exec(node.name, FREE_SPACE_COMMAND)) as chunks:
            async for chunk in chunks:
                said += chunk.data
                if len(said) > MAX_DISK_OUTPUT_BYTES:
                    return None
    except (GPUMeshError, TimeoutError):
        return None  # a host that runs no commands keeps that to itself
    return read_free_mib(bytes(said))
