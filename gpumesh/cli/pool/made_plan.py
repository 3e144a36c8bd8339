"""Makes the plan of `gpumesh pool plan`, by the running mesh or by one in this process, and says what to do with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, running_topology
from gpumesh.cli.pool.pool_choice import PlanRequest, yaml_entry
from gpumesh.cli.views.pool.start_progress import show_waiting
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPhase, PoolPlan, PoolState
from gpumesh.text.quoting import paste_command
from gpumesh.text.sentences import join_all
from gpumesh.topology import Topology

# While a pool is in one of these phases, its programs hold memory on its hosts.
HOLDING_PHASES = (PoolPhase.STARTING, PoolPhase.LOADING, PoolPhase.READY, PoolPhase.STOPPING)


@dataclass(frozen=True, slots=True)
class MadePlan:
    """``spec`` is the pool that was planned. ``is_in_file``: it is a pool of mesh.yaml; ``is_changed``: options have
    changed what mesh.yaml says of it. ``holders``: the pools that hold memory on the same nodes now."""

    spec: PoolSpec
    plan: PoolPlan
    is_in_file: bool
    is_changed: bool
    holders: tuple[str, ...] = ()

    def remarks(self) -> Iterator[str]:
        """What a person should know to read the plan right."""
        for name in self.holders:
            yield f"the pool {name} runs: what it holds on these nodes counts as memory of other programs"

    def how_to_start(self) -> Iterator[str]:
        """How a plan that fits becomes a pool that runs."""
        if self.is_in_file and not self.is_changed:
            if self.spec.name not in self.holders:
                yield paste_command("gpumesh pool up {POOL}", POOL=self.spec.name) + " starts it"
            return
        yield f"to start it so, write {'in its place' if self.is_in_file else 'under `pools:`'} in mesh.yaml:"
        yield yaml_entry(self.spec)


async def make_plan(options: GlobalOptions, request: PlanRequest) -> MadePlan:
    """Plans the pool. Raises GPUMeshError."""

    def keep_members(topology: Topology) -> Topology:
        """For a mesh in this process: no other node is waited for."""
        names = request.member_names(topology)
        return replace(topology, nodes=tuple(node for node in topology.nodes if node.name in names), models=())

    async with open_session(options, change_topology=keep_members) as session:
        topology = await running_topology(session, options)
        is_in_file = request.find_pool(topology) is not None
        names = request.member_names(topology)
        with show_waiting(f"looking at {join_all(names)}", quiet=options.quiet):
            state = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
            spec = request.make_spec(topology, state)
            plan = await session.plan_pool(spec)
            holders = _find_holders(await session.pools(), spec, topology)
    return MadePlan(spec, plan, is_in_file, request.changes_pool, holders)


def _find_holders(states: tuple[PoolState, ...], spec: PoolSpec, topology: Topology) -> tuple[str, ...]:
    """The pools that hold memory on nodes of ``spec``."""
    members = {member.node for member in spec.members}
    nodes_of = {pool.name: {member.node for member in pool.members} for pool in topology.pools}
    holding = [state.pool for state in states if state.phase in HOLDING_PHASES]
    return tuple(name for name in holding if members & nodes_of.get(name, set()))
