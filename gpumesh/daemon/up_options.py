"""The options of `up` that the mesh's process needs: which nodes, whether with a gateway, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpumesh import config
from gpumesh.errors import unknown_node
from gpumesh.topology import Topology


@dataclass(frozen=True, slots=True)
class UpOptions:
    """``nodes``: the names of the nodes to open; empty means all nodes. ``listen`` replaces mesh.yaml's, and has the
    form of ``config.parse_listen_option``."""

    nodes: tuple[str, ...] = ()
    gateway: bool = True
    listen: str | None = None


def apply_options(topology: Topology, options: UpOptions) -> Topology:
    """The topology with only the chosen nodes, and with the chosen ``listen``. ``options.gateway`` changes nothing
    here: ``run_mesh`` takes it. Raises UsageError."""
    names = [node.name for node in topology.nodes]
    for name in options.nodes:
        if name not in names:
            raise unknown_node(name, names)
    if options.nodes:
        topology = replace(topology, nodes=tuple(node for node in topology.nodes if node.name in options.nodes))
    if options.listen is not None:
        listen = config.parse_listen_option(options.listen, api_key_env=topology.gateway.api_key_env)
        topology = replace(topology, gateway=replace(topology.gateway, **listen._asdict()))
    return topology
