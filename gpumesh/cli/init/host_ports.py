"""Connects to the hosts of drafts once, to ask each on which ports its programs listen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpumesh.errors import GPUMeshError
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import NodeSpec, Topology

if TYPE_CHECKING:
    from gpumesh.tunnels.workers.worker_pool import WorkerPool

CONNECT_TIMEOUT_S = 12.0  # as long as the first report may take: a slow host is to be reached, too
COMMAND_TIMEOUT_S = 4.0  # after that, the usual ports are tried
_ENDED_PHASES = (TunnelPhase.UP, TunnelPhase.BACKOFF, TunnelPhase.FAILED)  # of the first attempt to connect


@dataclass(frozen=True, slots=True)
class HostAnswer:
    """The state of the connection to a host after the first attempt, and the ports on which the host listens; ``None``:
    the host does not tell, or was not reached."""

    tunnel: TunnelState
    ports: frozenset[int] | None = None

    @property
    def is_reached(self) -> bool:
        return self.tunnel.state is TunnelPhase.UP


async def ask_hosts(topology: Topology) -> Mapping[str, HostAnswer]:
    """Asks the hosts of all SSH nodes at the same time. Returns their answers by node. Never raises because of what a
    host does."""
    from gpumesh.tunnels.workers.worker_pool import WorkerPool

    specs = [spec for spec in topology.nodes if spec.ssh is not None]
    async with WorkerPool() as workers:
        answers = await asyncio.gather(*(_ask_host(spec, topology, workers) for spec in specs))
    return {spec.name: answer for spec, answer in zip(specs, answers, strict=True)}


async def _ask_host(spec: NodeSpec, topology: Topology, workers: WorkerPool) -> HostAnswer:
    """Opens a tunnel to the host, and asks the host for the ports on which it listens. Does not raise if the host
    cannot be reached: the state of the tunnel says why."""
    from gpumesh.probes import listening_ports
    from gpumesh.probes.commands.host_commands import HostCommands
    from gpumesh.tunnels.supervisor import open_tunnel, run_tunnel

    attempt_ended = asyncio.Event()

    def on_change(state: TunnelState) -> None:
        if state.state in _ENDED_PHASES:
            attempt_ended.set()

    assert spec.ssh is not None, "only SSH nodes are asked"
    try:
        tunnel = open_tunnel(
            spec, workers=workers, on_change=on_change, mesh_name=topology.name, mesh_identity=topology.identity
        )
    except (OSError, GPUMeshError) as error:  # no local port is free
        failed = TunnelState(spec.ssh.transport.value, TunnelPhase.FAILED, last_error=str(error))
        return HostAnswer(failed)
    async with run_tunnel(tunnel):
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await attempt_ended.wait()
        except TimeoutError:
            return HostAnswer(tunnel.state)
        state = tunnel.state
        if state.state is not TunnelPhase.UP:
            return HostAnswer(state)
        commands = HostCommands(tunnel, clock=time.monotonic)
        return HostAnswer(state, await listening_ports.list_ports(commands, timeout_s=COMMAND_TIMEOUT_S))
