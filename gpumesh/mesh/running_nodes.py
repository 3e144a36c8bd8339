"""``RunningNodes``: opens the nodes of a mesh, and opens, changes and closes some of them while the mesh runs.

A node that must end gets no new requests from that moment on. Its tunnel stays until its requests have ended, each
where it is, but not longer than a time limit. A successor with the same name serves meanwhile: the two share nothing
but the name.
"""

from __future__ import annotations

import asyncio
import logging

from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.inspection.regular_inspection import RegularInspection
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.node import Node
from gpumesh.mesh.nodes.node_changes import NodePlan
from gpumesh.mesh.nodes.node_factory import NodeFactory
from gpumesh.probes.http_client import forget_servers
from gpumesh.state import TunnelState
from gpumesh.topology import Topology
from gpumesh.tunnels.base import ClosableTunnel

log = logging.getLogger(__name__)

ABORTED_S = 5.0  # after the time limit, requests move to other nodes; so long the tunnel waits for the last of them


class RunningNodes:
    """The nodes of one mesh, whose tasks run in ``group``."""

    def __init__(
        self, fleet: Fleet, inspection: RegularInspection, factory: NodeFactory, group: asyncio.TaskGroup
    ) -> None:
        self._fleet = fleet
        self._inspection = inspection
        self._factory = factory
        self._group = group
        self._tasks: dict[Node, asyncio.Task[None]] = {}  # the task of each node that runs
        self._closing: set[asyncio.Task[None]] = set()  # those of nodes that are being closed

    def __repr__(self) -> str:
        return f"<RunningNodes {len(self._tasks)} running, {len(self._closing)} of them closing>"

    def start(self, topology: Topology) -> None:
        """Opens the tunnels of all nodes at the same time. Raises OSError and GPUMeshError."""
        for node in self._fleet:
            if node.spec.enabled:
                self._run(node, self._factory.make_tunnel(node.spec, topology, node.on_tunnel))

    def _run(self, node: Node, tunnel: ClosableTunnel) -> None:
        node.tunnel = tunnel  # set before the node's task runs
        self._tasks[node] = self._group.create_task(node.run(tunnel), name=f"node {node.name}")

    def stop(self) -> None:
        """Cancels all tasks. The task group waits for them."""
        for task in (*self._closing, *self._tasks.values()):
            task.cancel()

    def apply(self, plan: NodePlan, topology: Topology, *, limit_s: float) -> list[Node]:
        """Opens, changes and closes nodes, so that they are those of ``topology``, all at once: no request sees a part
        of it. ``limit_s``: so long the requests on closed nodes may go on. Returns the closed nodes.

        Raises OSError and GPUMeshError if a tunnel cannot be made; then nothing has changed."""
        opened: dict[str, Node] = {}
        tunnels = self._make_tunnels(plan, topology, opened)
        fleet, inspection = self._fleet, self._inspection
        closed = [node for node in fleet if node.name in plan.closed]
        if closed and self._factory.learned is not None:
            # It holds for the same server under another name, or through another tunnel.
            self._factory.learned.save(fleet)
        for node in closed:
            self._factory.scheduler.roster.remove(node.account)
            inspection.remove(node)
        old_roles = {node.name: node.role for node in closed}
        for spec in plan.opened:
            opened[spec.name] = node = self._factory.make_node(spec)
            if spec.name in old_roles:  # who has drained the node has not resumed it
                node.role.drained = old_roles[spec.name].drained
                node.role.drain_holds |= old_roles[spec.name].drain_holds
            if spec.enabled:
                inspection.add(node)
        nodes = {**{node.name: node for node in fleet}, **opened}
        fleet.replace_nodes(nodes[spec.name] for spec in topology.nodes)
        for spec in plan.kept:
            if fleet[spec.name].spec != spec:
                fleet[spec.name].change_spec(spec)
        for name, tunnel in tunnels.items():
            self._run(opened[name], tunnel)
        for node in closed:
            node.role.drained = True  # it gets no new requests, and those that it has may end
            node.update_account()
            if node in self._tasks:
                fleet.leaving.add(node)
                task = self._group.create_task(self._close(node, limit_s), name=f"end of {node.name}")
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        fleet.regroup()
        return closed

    def _make_tunnels(self, plan: NodePlan, topology: Topology, nodes: dict[str, Node]) -> dict[str, ClosableTunnel]:
        """Makes a tunnel for each enabled node that is opened, by its name: all tunnels, or none. ``nodes`` will hold
        the nodes when the tunnels run."""
        tunnels: dict[str, ClosableTunnel] = {}
        try:
            for spec in plan.opened:
                if spec.enabled:
                    tunnels[spec.name] = self._factory.make_tunnel(spec, topology, _Reports(nodes, spec.name))
        except BaseException:
            for tunnel in tunnels.values():
                tunnel.close()
            raise
        return tunnels

    async def _close(self, node: Node, limit_s: float) -> None:
        """Waits until the node's requests have ended, and closes its tunnel."""
        try:
            if not await self._wait_idle(node, limit_s):
                log.warning(
                    "%d requests on a node that has left the mesh did not end within %.0f s, and move to other nodes",
                    node.in_flight,
                    limit_s,
                    extra={"event": "leaving", "node": node.name},
                )
                node.ledger.abort_all_attempts()
                await self._wait_idle(node, ABORTED_S)
        finally:
            task = self._tasks.pop(node)
            task.cancel()
            self._fleet.leaving.discard(node)
        await asyncio.wait({task})
        if node.uses_ssh and node.tunnel is not None:  # another node may use the server of a direct node
            await forget_servers(self._factory.http, node.tunnel.urls.values())
        self._fleet.regroup()
        self._factory.changes.notify()

    async def _wait_idle(self, node: Node, limit_s: float) -> bool:
        """Returns as soon as the node has no request, at the latest after ``limit_s``. Returns whether it has none."""
        try:
            async with asyncio.timeout(limit_s):
                async with closing_iterator(self._factory.changes.watch()) as changes:
                    async for _ in changes:
                        if not node.ledger.held:
                            break
        except TimeoutError:
            pass
        return not node.ledger.held


class _Reports:
    """Passes the states of a tunnel on to its node, which is made after the tunnel."""

    def __init__(self, nodes: dict[str, Node], name: str) -> None:
        self._nodes = nodes
        self._name = name

    def __call__(self, state: TunnelState) -> None:
        self._nodes[self._name].on_tunnel(state)
