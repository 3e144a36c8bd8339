"""Inspects one node once: probes each route to its server by itself, and the free disk space where its models are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpumesh.errors import GPUMeshError
from gpumesh.probes.disk_space import FREE_SPACE_COMMAND, read_free_mib
from gpumesh.probes.routes import probe_routes
from gpumesh.state import NodeState, RouteState

if TYPE_CHECKING:
    import httpx

    from gpumesh.topology import NodeSpec

MAX_COMMAND_OUTPUT = 1 << 16  # bytes

RunCommand = Callable[[Sequence[str]], Awaitable[bytes]]
"""Runs a command on the node's host and returns its output, of which at most ``MAX_COMMAND_OUTPUT`` bytes are read.
Raises GPUMeshError."""


@dataclass(frozen=True, slots=True)
class InspectionReport:
    """The result of an inspection. ``store_free_mib`` is ``None`` if the host runs no commands or has no models."""

    routes: tuple[RouteState, ...]
    store_free_mib: int | None = None


async def inspect_node(
    client: httpx.AsyncClient,
    spec: NodeSpec,
    state: NodeState,
    *,
    api_key: str | None,
    run_command: RunCommand,
    timeout_s: float,
) -> InspectionReport:
    """Probes the node's routes and its free disk space at the same time. ``state`` has the URLs by which the node is
    reached now. Never raises because of what the node does."""
    routes, free_mib = await asyncio.gather(
        probe_routes(client, spec, state, api_key=api_key, timeout_s=timeout_s),
        _probe_free_space(run_command, timeout_s),
    )
    return InspectionReport(routes, free_mib)


async def _probe_free_space(run_command: RunCommand, timeout_s: float) -> int | None:
    """The free disk space in MiB where the host keeps its models; ``None`` if the host does not say."""
    try:
        async with asyncio.timeout(timeout_s):
            return read_free_mib(await run_command(FREE_SPACE_COMMAND))
    except (GPUMeshError, TimeoutError):
        return None


def merge_report(state: NodeState, report: InspectionReport) -> NodeState:
    """The state with the results of the inspection, unless the node is reached by other URLs now."""
    if configured_urls(state.routes) != configured_urls(report.routes):
        return state
    return replace(state, routes=report.routes, host=replace(state.host, store_free_mib=report.store_free_mib))


def configured_urls(routes: Sequence[RouteState]) -> list[str]:
    """The URLs of the routes that mesh.yaml names."""
    return [route.url for route in routes if not route.offered]
