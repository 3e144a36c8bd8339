"""Nodes to test with, not started or running over a direct tunnel, and slots there; what nodes announce is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from urllib.parse import urlsplit

import httpx
import msgspec

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.forecast import Copies, FleetLoad, forecast, place_on
from gpumesh.balancer.models.model_demand import ModelDemand
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.balancer.work import Work
from gpumesh.coordination.base import Coordination
from gpumesh.coordination.single_gateway import SingleGateway
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.nodes.node import Node
from gpumesh.text.model_names import full_name
from gpumesh.topology import BackendSpec, NodeSpec, PolicyKind, Target
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.http_clients import loopback_client


@dataclass
class NodeEvents:
    """What a node has announced. ``now`` is the time by the node's clock."""

    slots_freed: int = 0
    changed: int = 0
    gpus_identified: int = 0
    now: float = 100.0
    changes: ChangeNotifier = field(default_factory=ChangeNotifier)

    def clock(self) -> float:
        return self.now

    def on_slot_freed(self) -> None:
        self.slots_freed += 1

    def on_changed(self) -> None:
        self.changed += 1

    def on_gpus_identified(self) -> None:
        self.gpus_identified += 1


def make_spec(url: str, *, name: str = "one", **backend: object) -> NodeSpec:
    target = Target("127.0.0.1", urlsplit(url).port or 80)
    return NodeSpec(name, BackendSpec(targets=(target,), **backend))  # type: ignore[arg-type]


class OtherGateways(SingleGateway):
    """A coordination whose other gateways have ``load`` requests in flight everywhere. ``keys``: what was asked for."""

    def __init__(self, load: int = 5) -> None:
        super().__init__()
        self.load = load
        self.keys: list[str] = []

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:
        self.keys.append(key)
        return self.load


def make_scheduler(policy: PolicyKind = PolicyKind.LEAST_LOADED, *, max_queue: int = 100) -> Scheduler:
    return Scheduler(policy, rng=Random(7), max_queue=max_queue)


def make_node(
    spec: NodeSpec,
    events: NodeEvents,
    *,
    http: httpx.AsyncClient | None = None,
    scheduler: Scheduler | None = None,
    coordination: Coordination | None = None,
) -> Node:
    """A node that is not started."""
    return Node(
        spec,
        clock=events.clock,
        http=http or loopback_client(),
        changes=events.changes,
        scheduler=scheduler or make_scheduler(),
        on_slot_freed=events.on_slot_freed,
        on_changed=events.on_changed,
        on_gpus_identified=events.on_gpus_identified,
        coordination=coordination,
    )


def place(account: NodeAccount, demand: Demand, now: float) -> Placement:
    """Places a request on this node, whatever its load and state, as a scheduler does that has chosen it."""
    if demand.residency is None and demand.model is not None:
        demand = msgspec.structs.replace(demand, residency=ResidencyKey(full_name(demand.model)))
    work, fleet = Work(), FleetLoad(Experience(), ModelDemand(), Copies())
    found = forecast(account, demand, work, fleet, 0.0, now)
    return Placement(place_on(account, demand, work, found, now), found, (found,))


def take_lease(node: Node, demand: Demand, now: float) -> Lease:
    """A lease of this node, whatever its load and state; with a slot if the demand needs one."""
    return node.lease(demand, place(node.account, demand, now) if demand.needs_slot else None)


@asynccontextmanager
async def run_node(
    spec: NodeSpec, events: NodeEvents, *, coordination: Coordination | None = None
) -> AsyncIterator[Node]:
    async with loopback_client() as http:
        node = make_node(spec, events, http=http, coordination=coordination)
        tunnel = DirectTunnel(spec, clock=asyncio.get_running_loop().time, on_change=node.on_tunnel)
        task = asyncio.create_task(node.run(tunnel))
        try:
            yield node
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
