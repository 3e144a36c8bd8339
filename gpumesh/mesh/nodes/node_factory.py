"""``NodeFactory``: makes the nodes of a mesh and their tunnels, from the parts that all nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import httpx

from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.coordination.base import Coordination
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.learned_state import LearnedState
from gpumesh.mesh.nodes.node import Node
from gpumesh.state import TunnelState
from gpumesh.topology import NodeSpec, Topology
from gpumesh.tunnels.base import ClosableTunnel
from gpumesh.tunnels.direct.this_machine import ThisMachine
from gpumesh.tunnels.supervisor import Prompter, open_tunnel
from gpumesh.tunnels.transport import ReverseForward
from gpumesh.tunnels.workers.worker_pool import WorkerPool


@dataclass(slots=True)
class NodeFactory:
    """The arguments of ``Node`` and of ``open_tunnel`` that are the same for all nodes; see there. ``workers`` must be
    set before the first tunnel is made."""

    clock: Callable[[], float]
    rng: Random
    http: httpx.AsyncClient
    changes: ChangeNotifier
    scheduler: Scheduler
    coordination: Coordination
    rules: ModelRules
    learned: LearnedState | None
    prompter: Prompter | None
    on_slot_freed: Callable[[], None]
    on_changed: Callable[[], None]
    on_gpus_identified: Callable[[], None]
    workers: WorkerPool | None = None
    this_machine: ThisMachine = field(default_factory=ThisMachine)

    def make_node(self, spec: NodeSpec) -> Node:
        """Makes a node, and adds it to the scheduler."""
        return Node(
            spec,
            clock=self.clock,
            http=self.http,
            changes=self.changes,
            scheduler=self.scheduler,
            on_slot_freed=self.on_slot_freed,
            on_changed=self.on_changed,
            on_gpus_identified=self.on_gpus_identified,
            coordination=self.coordination,
            rules=self.rules,
            learned=self.learned,
        )

    def make_tunnel(
        self,
        spec: NodeSpec,
        topology: Topology,
        on_change: Callable[[TunnelState], None],
        reverse_forwards: Sequence[ReverseForward] = (),
    ) -> ClosableTunnel:
        """Makes the tunnel of a node of ``topology``. Raises OSError and GPUMeshError when its local ends cannot be
        made."""
        assert self.workers is not None, "the mesh has not begun"
        return open_tunnel(
            spec,
            clock=self.clock,
            rng=self.rng,
            workers=self.workers,
            on_change=on_change,
            prompter=self.prompter,
            this_machine=self.this_machine,
            tunnels_spec=topology.tunnels,
            mesh_name=topology.name,
            mesh_identity=topology.identity,
            reverse_forwards=reverse_forwards,
        )
