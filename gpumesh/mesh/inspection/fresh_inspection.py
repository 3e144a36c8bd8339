"""Inspects all nodes at once, for a person who waits for the result (`gpumesh audit`)."""

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

# Seconds since the start. After the early report, the nodes that are up are inspected, while the other nodes may still
# connect. Together with the time-outs this stays within the 10 s that a command may take if a node does not answer.
EARLY_REPORT_S = 3.0
REPORT_DEADLINE_S = 7.0
TIMEOUT_S = 2.5  # for the inspection of one node
LATE_TIMEOUT_S = 1.0  # the same, for a node that was not up at the early report

WaitFirstReport = Callable[[float], Awaitable[MeshState]]
"""Waits until all nodes have reported, for this number of seconds at most, and returns the state."""
RunCommandOn = Callable[[str, Sequence[str]], Awaitable[bytes]]
"""As ``node_inspection.RunCommand``, with the name of the node before the command."""


# The findings of the mesh itself that no look at the nodes replaces.
_KEPT_CODES = frozenset({"pool-down"})


@dataclass(frozen=True, slots=True)
class _Inspector:
    """Inspects several nodes at the same time. ``specs`` are the enabled nodes of mesh.yaml, by name."""

    client: httpx.AsyncClient
    specs: dict[str, NodeSpec]
    run_command_on: RunCommandOn

    async def inspect(self, nodes: Sequence[NodeState], timeout_s: float) -> dict[str, InspectionReport]:
        """Inspects the nodes, and returns the reports by node. There is no report on a node that is not up, that
        mesh.yaml disables, or whose API key is missing."""
        up_nodes = [node for node in nodes if node.tunnel.state is TunnelPhase.UP and node.name in self.specs]
        reports = await asyncio.gather(*(self._inspect_node(node, timeout_s) for node in up_nodes))
        return {node.name: report for node, report in zip(up_nodes, reports, strict=True) if report is not None}

    async def _inspect_node(self, node: NodeState, timeout_s: float) -> InspectionReport | None:
        """The report on the node; ``None`` if the server's API key is missing."""
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
    """Inspects all nodes, and returns the mesh's state with their reports and the findings against ``topology``."""
    loop = asyncio.get_running_loop()
    start_time = loop.time()
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled}
    async with make_http_client(timeout=TIMEOUT_S) as client:
        inspector = _Inspector(client, specs, run_command_on)
        state = await wait_first_report(EARLY_REPORT_S)
        reports = await inspector.inspect(state.nodes, TIMEOUT_S)
        time_left_s = start_time + REPORT_DEADLINE_S - loop.time()
        state = await wait_first_report(max(time_left_s, 0.1))  # a new state is needed even if no time is left
        late_nodes = [node for node in state.nodes if node.name not in reports]
        reports |= await inspector.inspect(late_nodes, LATE_TIMEOUT_S)
    nodes: list[NodeState] = []
    for node in state.nodes:
        report = reports.get(node.name)
        nodes.append(_mark_absent(node if report is None else merge_report(node, report)))
    kept = [finding for finding in state.findings if finding.code in _KEPT_CODES]
    return replace(state, nodes=tuple(nodes), findings=(*audit.collect_findings(topology, nodes), *kept))


def _mark_absent(node: NodeState) -> NodeState:
    """The node's state with a time-out as error if its host has not answered by now. So the host counts as absent, even
    if mesh.yaml gives it more time."""
    tunnel = node.tunnel
    is_first_attempt = tunnel.state is TunnelPhase.CONNECTING and tunnel.last_error is None
    if not is_first_attempt:  # the host has answered, or there is an error already
        return node
    message = f"no connection within {REPORT_DEADLINE_S:g} s"
    return replace(node, tunnel=replace(tunnel, last_error=message, error_code=ConnectTimeout.code))
