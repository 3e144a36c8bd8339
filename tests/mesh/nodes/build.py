"""Nodes to test with, not started or running over a direct tunnel; what they announce is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from gpumesh.coordination.base import Coordination
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.nodes.node import Node
from gpumesh.topology import BackendSpec, NodeSpec, Target
from gpumesh.tunnels.direct.tunnel import DirectTunnel


@dataclass
class NodeEvents:
    """What a node has announced. ``now`` is the time by the node's clock."""

    slots_freed: int = 0
    gpus_identified: int = 0
    now: float = 100.0
    changes: ChangeNotifier = field(default_factory=ChangeNotifier)

    def clock(self) -> float:
        return self.now

    def on_slot_freed(self) -> None:
        self.slots_freed += 1

    def on_gpus_identified(self) -> None:
        self.gpus_identified += 1


def make_spec(url: str, *, name: str = "one", **backend: object) -> NodeSpec:
    target = Target("127.0.0.1", urlsplit(url).port or 80)
    return NodeSpec(name, BackendSpec(targets=(target,), **backend))  # type: ignore[arg-type]


def make_node(
    spec: NodeSpec,
    events: NodeEvents,
    *,
    http: httpx.AsyncClient | None = None,
    coordination: Coordination | None = None,
) -> Node:
    """A node that is not started."""
    return Node(
        spec,
        clock=events.clock,
        http=http or httpx.AsyncClient(trust_env=False),
        changes=events.changes,
        on_slot_freed=events.on_slot_freed,
        on_gpus_identified=events.on_gpus_identified,
        coordination=coordination,
    )


@asynccontextmanager
async def run_node(spec: NodeSpec, events: NodeEvents) -> AsyncIterator[Node]:
    async with httpx.AsyncClient(trust_env=False) as http:
        node = make_node(spec, events, http=http)
        tunnel = DirectTunnel(spec, clock=asyncio.get_running_loop().time, on_change=node.on_tunnel)
        task = asyncio.create_task(node.run(tunnel))
        try:
            yield node
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
