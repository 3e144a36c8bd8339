"""An inspection of all nodes at once, for somebody who waits for it: `gpumesh audit`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from gpumesh import audit, config
from gpumesh.errors import ConnectTimeout, SecretMissing
from gpumesh.mesh.inspection.node_inspection import InspectionReport, inspect_node, merge_report
from gpumesh.probes.http_client import make_http_client
from gpumesh.state import MeshState, NodeState, TunnelPhase

if TYPE_CHECKING:
    import httpx

    from gpumesh.topology import NodeSpec, Topology

# All of it stays within the 10 s that a command may take when a node is ill: healthy nodes are inspected while the
# others are still waited for.
EARLY_REPORT_S = 3.0
REPORT_DEADLINE_S = 7.0
TIMEOUT_S = 2.5
LATE_TIMEOUT_S = 1.0  # of nodes that were not up at the early report

WaitFirstReport = Callable[[float], Awaitable[MeshState]]
RunCommandOn = Callable[[str, Sequence[str]], Awaitable[bytes]]
"""Runs a command on the host of the node of this name; else as ``node_inspection.RunCommand``."""


@dataclass(frozen=True, slots=True)
class _Inspector:
    client: httpx.AsyncClient
    specs: dict[str, NodeSpec]
    run_command_on: RunCommandOn

    async def inspect(self, nodes: Sequence[NodeState], timeout_s: float) -> dict[str, InspectionReport]:
        """The reports of those nodes that are up, by name."""
        up = [node for node in nodes if node.tunnel.state is TunnelPhase.UP and node.name in self.specs]
        reports = await asyncio.gather(*(self._inspect_node(node, timeout_s) for node in up))
        return {node.name: report for node, report in zip(up, reports, strict=True) if report is not None}

    async def _inspect_node(self, node: NodeState, timeout_s: float) -> InspectionReport | None:
        spec = self.specs[node.name]
        variable = spec.backend.api_key_env
        try:
            api_key = None if variable is None else config.read_secret(variable, node=spec.name)
        except SecretMissing:
            return None  # the missing secret is a finding of its own
        run_command = partial(self.run_command_on, spec.name)
        return await inspect_node(
            self.client, spec, node, api_key=api_key, run_command=run_command, timeout_s=timeout_s
        )


async def inspect_mesh(
    wait_first_report: WaitFirstReport, run_command_on: RunCommandOn, topology: Topology
) -> MeshState:
    """The mesh's state with the reports of its nodes, and the findings by this topology."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled}
    async with make_http_client(timeout=TIMEOUT_S) as client:
        inspector = _Inspector(client, specs, run_command_on)
        state = await wait_first_report(EARLY_REPORT_S)
        reports = await inspector.inspect(state.nodes, TIMEOUT_S)
        state = await wait_first_report(max(started + REPORT_DEADLINE_S - loop.time(), 0.1))
        late = [node for node in state.nodes if node.name not in reports]
        reports |= await inspector.inspect(late, LATE_TIMEOUT_S)
    nodes = tuple(
        _mark_unanswered(merge_report(node, reports[node.name]) if node.name in reports else node)
        for node in state.nodes
    )
    return replace(state, nodes=nodes, findings=audit.collect_findings(topology, nodes))


def _mark_unanswered(node: NodeState) -> NodeState:
    """A host that has not answered by now counts as absent, however long mesh.yaml lets it take."""
    tunnel = node.tunnel
    if tunnel.state is not TunnelPhase.CONNECTING or tunnel.last_error is not None:
        return node
    message = f"no connection within {REPORT_DEADLINE_S:g} s"
    return replace(node, tunnel=replace(tunnel, last_error=message, error_code=ConnectTimeout.code))
