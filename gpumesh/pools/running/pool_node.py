"""The node as which a running pool serves in its mesh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gpumesh.errors import PoolFailed
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan
from gpumesh.pools.hosts.commands import LOOPBACK
from gpumesh.topology import BackendKind, BackendSpec, NodeSpec, Target

DRAIN_S = 10.0  # for the requests of a pool that is stopped to end where they are
LEAVE_S = 2.0  # after that, for their move to other nodes
USABLE_TIMEOUT_S = 20.0  # for the tunnel of the pool's node, and for the first probe of its server


def make_pool_node(spec: PoolSpec, plan: PoolPlan, head: NodeSpec, port: int) -> NodeSpec:
    """The node of a pool whose llama-server listens at ``port`` of the loopback of ``head``'s host."""
    members = tuple(member.node for member in plan.members if member.is_head or member.layers)
    backend = BackendSpec(BackendKind.LLAMACPP, (Target(LOOPBACK, port),), max_parallel=spec.parallel)
    return NodeSpec(spec.name, backend, ssh=head.ssh, tier=head.tier, pool_members=members)


class PoolNode:
    """The membership of one running pool in ``mesh``."""

    def __init__(self, mesh: Mesh, spec: PoolSpec) -> None:
        self._mesh = mesh
        self._spec = spec
        self._is_member = False

    def __repr__(self) -> str:
        return f"<PoolNode {self._spec.name} {'MEMBER' if self._is_member else 'AWAY'}>"

    @asynccontextmanager
    async def joined(self, node: NodeSpec) -> AsyncIterator[None]:
        """Serves as ``node`` during the block, which begins when requests can be sent to it. At the end, lets the
        requests there end; after ``leave_at_once``, they have moved to other nodes. Raises OSError and GPUMeshError."""
        self._mesh.set_pool_node(node.name, node, limit_s=0.0)
        self._is_member = True
        try:
            await self._wait_for(lambda: self._mesh.fleet.find_node(node.name).reachable, USABLE_TIMEOUT_S)
            if not self._mesh.fleet.find_node(node.name).reachable:
                reason = self._mesh.fleet.find_node(node.name).state(queued=0).reason or "no answer"
                raise PoolFailed(f"the mesh does not reach the pool's llama-server: {reason}")
            yield
        finally:
            self._leave(DRAIN_S)
            await self._wait_for(self._has_left, DRAIN_S + LEAVE_S)

    def has_requests(self) -> bool:
        """Whether requests run on the pool now."""
        return any(node.in_flight for node in self._mesh.fleet if node.name == self._spec.name)

    def leave_at_once(self) -> None:
        """Takes the pool out of the mesh. Its requests are sent to other nodes, or end with an explicit error."""
        self._leave(0.0)

    def _leave(self, limit_s: float) -> None:
        if self._is_member:
            self._is_member = False
            self._mesh.set_pool_node(self._spec.name, None, limit_s=limit_s)

    def _has_left(self) -> bool:
        return not any(node.name == self._spec.name for node in self._mesh.fleet.leaving)

    async def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Waits until ``condition`` holds, at most ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s), closing_iterator(self._mesh.watch_changes()) as changes:
                async for _ in changes:
                    if condition():
                        return
        except TimeoutError:
            pass  # the caller looks again
