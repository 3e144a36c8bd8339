"""The hosts of a pool's members, as the mesh reaches them: over SSH, or this machine itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.errors import ExecError, GPUMeshError, PoolMemberUnusable, TunnelDown, TunnelError, tunnel_error_from_code
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.hosts.route import HostRoute, ProgramStream
from gpumesh.state import TunnelPhase
from gpumesh.topology import NodeSpec
from gpumesh.tunnels.base import ExecResult, Tunnel
from gpumesh.tunnels.direct.this_machine import run_command

UP_TIMEOUT_S = 12.0  # for a tunnel that connects now; enough for one attempt


@dataclass(frozen=True, slots=True)
class MemberHost:
    """A member that can be reached. ``route`` runs commands on its host."""

    member: PoolMember
    node: NodeSpec
    route: HostRoute

    @property
    def is_here(self) -> bool:
        """Whether the host is this machine."""
        return self.node.ssh is None


async def reach_members(mesh: Mesh, spec: PoolSpec) -> tuple[dict[str, MemberHost], dict[str, GPUMeshError]]:
    """The members that can be reached now, by their nodes, and why the others cannot. Waits for tunnels that are being
    opened. Raises PoolMemberUnusable."""
    nodes = {node.name: node for node in mesh.file_topology.nodes}
    hosts: dict[str, MemberHost] = {}
    errors: dict[str, GPUMeshError] = {}
    tunnels = [_find_tunnel(mesh, nodes.get(member.node), member.node) for member in spec.members]
    reached = await asyncio.gather(
        *(_reach(tunnel, nodes[m.node]) for m, tunnel in zip(spec.members, tunnels, strict=True))
    )
    for member, result in zip(spec.members, reached, strict=True):
        if isinstance(result, GPUMeshError):
            errors[member.node] = result
        else:
            hosts[member.node] = MemberHost(member, nodes[member.node], result)
    return hosts, errors


def _find_tunnel(mesh: Mesh, node: NodeSpec | None, name: str) -> Tunnel:
    if node is None:
        raise PoolMemberUnusable(
            f"{name} is not in the running mesh",
            hint="`gpumesh up` without names opens all nodes of mesh.yaml",
            node=name,
        )
    if not node.enabled:
        raise PoolMemberUnusable(f"{name} is disabled in mesh.yaml", hint=f"set `enabled: true` for {name}", node=name)
    if not node.has_host:
        raise PoolMemberUnusable(
            f"{name} is another machine that is reached without SSH, so nothing can be started there",
            hint=f"give {name} an `ssh:` section in mesh.yaml",
            node=name,
        )
    return mesh.tunnel(name)


async def _reach(tunnel: Tunnel, node: NodeSpec) -> HostRoute | GPUMeshError:
    """The route to the node's host, or why there is none."""
    if node.ssh is None:
        return ThisMachineRoute(node.name, tunnel)
    if tunnel.state.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED):
        tunnel.retry_now()  # the pool waits between its starts as the tunnel does
    try:
        async with asyncio.timeout(UP_TIMEOUT_S):
            await tunnel.wait_up()
    except TunnelError as error:
        return error
    except TimeoutError:
        state = tunnel.state
        if state.last_error is None:
            return TunnelDown(f"{node.name} does not answer yet", node=node.name)
        return tunnel_error_from_code(state.error_code or "", state.last_error, hint=state.hint, node=node.name)
    return tunnel


class ThisMachineRoute:
    """Runs commands on this machine, for a node without SSH, also while the node's own server does not run."""

    def __init__(self, node: str, tunnel: Tunnel) -> None:
        self._node = node
        self._tunnel = tunnel

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        if self._tunnel.state.state is TunnelPhase.UP:  # then it is checked that the server is on this machine
            return await self._tunnel.exec(argv, timeout_s=timeout_s, limit_bytes=limit_bytes, shareable=shareable)
        try:
            return await run_command(argv, timeout_s=timeout_s, limit_bytes=limit_bytes)
        except TimeoutError as error:
            raise ExecError(f"no end of {argv[0]!r} within {timeout_s:g} s on {self._node}", node=self._node) from error
        except (OSError, ValueError) as error:
            raise ExecError(f"{argv[0]!r} cannot be run on {self._node}: {error}", node=self._node) from error

    async def open_program(self, argv: Sequence[str]) -> ProgramStream:
        return await self._tunnel.open_program(argv)
