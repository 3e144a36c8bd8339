"""Finds the node of mesh.yaml that a person named."""

from __future__ import annotations

from gpumesh.errors import unknown_node
from gpumesh.topology import NodeSpec, Topology


def find_node(topology: Topology, name: str) -> NodeSpec:
    """The node with this name. Raises UsageError, which names the nodes, if there is none."""
    try:
        return topology.node(name)
    except KeyError:
        raise unknown_node(name, (node.name for node in topology.nodes)) from None
