"""A dispatcher over running nodes. The test sets the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from gpumesh.balancer.account import GpuGroup
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.coordination.base import Coordination
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults, ModelProfile
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.shared_places import SharedPlaces
from gpumesh.topology import PolicyKind
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.http_clients import loopback_client
from tests.mesh.meshes import MODEL, host, node
from tests.mesh.nodes.build import NodeEvents, OtherGateways, make_node, make_scheduler
from tests.tunnels.polling import wait_until

DEMAND = Demand(model=MODEL)


class DispatchEvents(NodeEvents):
    """A freed slot goes to the queue, and a changed node is looked at, as in a mesh."""

    dispatcher: Dispatcher

    def on_slot_freed(self) -> None:
        self.dispatcher.grant_waiting()

    def on_changed(self) -> None:
        self.dispatcher.note_nodes_changed()


@dataclass
class Desk:
    """``now`` is the time by every clock but the tunnels'."""

    fleet: Fleet
    scheduler: Scheduler
    dispatcher: Dispatcher
    hosts: dict[str, SimOllama]
    events: DispatchEvents
    others: OtherGateways

    @property
    def now(self) -> float:
        return self.events.now

    @now.setter
    def now(self, now: float) -> None:
        self.events.now = now

    async def acquire(self, demand: Demand = DEMAND, **more: Any) -> Lease:
        return await self.dispatcher.acquire(demand, **{"timeout_s": 20.0, **more})

    async def queue(self, demand: Demand = DEMAND, **more: Any) -> asyncio.Task[Lease]:
        """Starts a request that is in the queue on return."""
        queued = self.dispatcher.queued
        task = asyncio.create_task(self.acquire(demand, **more))
        await wait_until(lambda: self.dispatcher.queued > queued, "it waits")
        return task

    async def fail(self, node: str, times: int = 3) -> None:
        """So many requests fail on this node, by its fault."""
        for _ in range(times):
            (await self.acquire(Demand(model=MODEL, node=node))).release(Outcome.UNREACHABLE, error="it failed")

    async def lose(self, node: str) -> None:
        """The node is away from now on, but may come back in a moment."""
        await self.hosts[node].set_faults(Faults(refuse=True))
        self.fleet[node].tunnel.suspect("test")  # type: ignore[union-attr]
        await wait_until(lambda: not self.fleet[node].reachable, "it is away")

    def share_gpu(self, *names: str) -> GpuGroup:
        group = GpuGroup("one GPU", [self.fleet[name].account for name in names])
        for account in group.accounts:
            account.group = group
        return group

    def in_flight(self) -> int:
        return sum(node.in_flight for node in self.fleet)


@asynccontextmanager
async def open_desk(
    *names: str,
    max_parallel: int = 1,
    max_queue: int = 100,
    policy: PolicyKind = PolicyKind.LEAST_LOADED,
    cold: frozenset[str] = frozenset(),
    neighbours: Coordination | None = None,
) -> AsyncIterator[Desk]:
    """``cold``: the nodes that do not have the model in memory. ``neighbours``: the other gateways, which share their
    places; ``None``: they only have a load."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(loopback_client())
        models = {name: ModelProfile(MODEL, resident=name not in cold) for name in names}
        profiles = {name: host(name, models=(model,)) for name, model in models.items()}
        hosts = {name: await stack.enter_async_context(SimOllama(profile)) for name, profile in profiles.items()}
        events = DispatchEvents(now=1000.0)
        specs = [node(name, server.url, max_parallel=max_parallel) for name, server in hosts.items()]
        scheduler = make_scheduler(policy, max_queue=max_queue)
        others = OtherGateways(0)
        nodes = [
            make_node(spec, events, http=http, scheduler=scheduler, coordination=neighbours or others) for spec in specs
        ]
        fleet = Fleet(nodes, clock=events.clock)
        places = None if neighbours is None else SharedPlaces(fleet, scheduler, neighbours, clock=events.clock)
        events.dispatcher = Dispatcher(fleet, scheduler, clock=events.clock, grace_s=5.0, places=places)
        desk = Desk(fleet, scheduler, events.dispatcher, hosts, events, others)
        tasks = [
            asyncio.create_task(running.run(DirectTunnel(running.spec, on_change=running.on_tunnel)), name=running.name)
            for running in fleet
        ]
        try:
            await wait_until(lambda: all(running.reachable for running in fleet), "all nodes are up")
            yield desk
        finally:
            desk.dispatcher.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def release_in_turn(desk: Desk, waiting: Sequence[tuple[str, asyncio.Task[Lease]]], holder: Lease) -> list[str]:
    """Frees one slot again and again; the names in the order in which they got it."""
    served: list[str] = []
    left = dict(waiting)
    while left:
        holder.release(Outcome.SERVED)
        await asyncio.wait(left.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [name for name, task in left.items() if task.done()]
        assert len(done) == 1, "one slot, one lease"
        served += done
        holder = left.pop(done[0]).result()
    holder.release(Outcome.SERVED)
    assert desk.in_flight() == 0
    assert desk.dispatcher.queued == 0
    return served
