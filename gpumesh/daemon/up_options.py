"""The options of `up` that the mesh's process needs: its nodes, with or without a gateway, the gateway's address."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpumesh import config
from gpumesh.errors import UsageError, unknown_node
from gpumesh.topology import Topology


@dataclass(frozen=True, slots=True)
class UpOptions:
    """Options of `up`. ``nodes``: the names of the nodes to open; empty means all nodes. ``listen`` replaces the
    ``gateway.listen`` of mesh.yaml; ``config.parse_listen_option`` says how it is written."""

    nodes: tuple[str, ...] = ()
    gateway: bool = True
    listen: str | None = None


def apply_options(topology: Topology, options: UpOptions) -> Topology:
    """Returns the topology with only the chosen nodes, and with the chosen ``listen``. Raises UsageError.

    ``options.gateway`` changes nothing here: it is an argument of ``run_mesh``.
    """
    names = [node.name for node in topology.nodes]
    for name in options.nodes:
        if name not in names:
            raise unknown_node(name, names)
    if options.nodes:
        chosen_nodes = tuple(node for node in topology.nodes if node.name in options.nodes)
        topology = replace(topology, nodes=chosen_nodes)
    if options.listen is not None:
        listen = config.parse_listen_option(options.listen, has_key=topology.gateway.needs_key)
        gateway = replace(topology.gateway, host=listen.host, port=listen.port, socket=listen.socket)
        topology = replace(topology, gateway=gateway)
    return topology


def select_nodes(topology: Topology, options: UpOptions) -> tuple[Topology, tuple[str, ...]]:
    """What a mesh that was started with these options takes over from its file, and the names of the nodes that it
    leaves alone. A chosen node that the file does not have any more is no error, unless no other is left: then raises
    UsageError. The address is another matter (``plan_live_changes``)."""
    if not options.nodes:
        return topology, ()
    chosen = tuple(node for node in topology.nodes if node.name in options.nodes)
    if not chosen:
        raise UsageError(
            f"mesh.yaml has none of the nodes any more with which `gpumesh up` was started: {', '.join(options.nodes)}",
            hint="`gpumesh down`, then `gpumesh up -d` opens all nodes of the file",
        )
    not_opened = tuple(node.name for node in topology.nodes if node.name not in options.nodes)
    return replace(topology, nodes=chosen), not_opened
