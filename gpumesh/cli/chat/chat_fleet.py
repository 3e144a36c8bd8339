"""``ChatFleet``: the models and nodes of the mesh, as a chat has last heard of them."""

from __future__ import annotations

from contextlib import suppress

from gpumesh.cli.fleet_models import FleetModels
from gpumesh.daemon.sessions.session import Session
from gpumesh.errors import GPUMeshError
from gpumesh.state import MeshState
from gpumesh.topology import Topology


class ChatFleet:
    """Keeps the last state of the mesh, for completion and for ``/model`` and ``/node``."""

    def __init__(self, session: Session, topology: Topology, models: FleetModels, state: MeshState) -> None:
        self.models = models
        self._session = session
        self._topology = topology
        self._state = state

    async def refresh(self) -> None:
        """Asks the mesh anew. If it cannot be asked, what it said before stays."""
        with suppress(GPUMeshError):  # the next message fails with the same error, which is shown then
            configuration = await self._session.configuration()  # the mesh may have read its file anew
            if configuration is not None:
                self._topology = configuration.running_topology
            self._state = await self._session.status()
            self.models = FleetModels.of(self._state, self._topology)

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self._state.nodes)

    def describe_nodes(self) -> list[tuple[str, str]]:
        """For each node its name, and a line with its name, its health and the reason for it."""
        width = max((len(name) for name in self.node_names), default=0)
        rows = []
        for node in self._state.nodes:
            reason = f", {node.reason}" if node.reason else ""
            rows.append((node.name, f"{node.name:<{width}}  {node.health}{reason}"))
        return rows
