"""Decides what a running mesh does with each node when its mesh.yaml has changed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gpumesh.topology import NodeSpec, Topology


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What happens to the nodes.

    - ``opened``: they get a new tunnel, unless they are disabled. They are new, or their old tunnel cannot be used any
      more.
    - ``kept``: they keep their tunnel. Their spec may have changed.
    - ``closed``: the names of the running nodes that end. They were removed, or ``opened`` has a new node of the same
      name.
    - ``reopened``: the names of the nodes that had a tunnel and get a new one. ``opened`` and ``closed`` have them too.
    """

    opened: tuple[NodeSpec, ...]
    kept: tuple[NodeSpec, ...]
    closed: frozenset[str]
    reopened: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AppliedChange:
    """What became of the nodes: ``reopened`` have a new tunnel in place of an old one, and ``leaving`` has the numbers
    of requests that still run on nodes that ended, by their names."""

    reopened: tuple[str, ...] = ()
    leaving: Mapping[str, int] = field(default_factory=dict)


def plan_nodes(running: Topology, current: Topology) -> NodePlan:
    """Compares the nodes of the running mesh with the nodes of the mesh.yaml that is ``current`` now."""
    local_ends_changed = running.tunnels != current.tunnels
    running_specs = {spec.name: spec for spec in running.nodes}
    opened, kept = [], []
    for spec in current.nodes:
        running_spec = running_specs.get(spec.name)
        if running_spec is None or needs_new_tunnel(running_spec, spec, local_ends_changed=local_ends_changed):
            opened.append(spec)
        else:
            kept.append(spec)
    closed = running_specs.keys() - {spec.name for spec in kept}
    had_tunnel = {name for name, spec in running_specs.items() if spec.enabled}
    reopened = [spec.name for spec in opened if spec.enabled and spec.name in had_tunnel]
    return NodePlan(tuple(opened), tuple(kept), frozenset(closed), tuple(reopened))


def needs_new_tunnel(before: NodeSpec, after: NodeSpec, *, local_ends_changed: bool = False) -> bool:
    """Whether the change of a node leads to another host or server. Weight, tier, labels, expectations, slots, and the
    kind and the key of its server are changed without a new tunnel. ``local_ends_changed``: the section ``tunnels`` of
    mesh.yaml has changed, which says where each SSH tunnel listens on this machine."""
    if not before.enabled and not after.enabled:  # it has no tunnel
        return before.ssh != after.ssh or before.backend.targets != after.backend.targets
    return (
        before.enabled != after.enabled
        or before.ssh != after.ssh
        or before.backend.targets != after.backend.targets
        or (local_ends_changed and after.ssh is not None)
    )


def with_pool_nodes(topology: Topology, running: Topology) -> Topology:
    """``topology`` of a changed mesh.yaml with the nodes of the pools that run. Such a node goes with its head: it
    stays only while mesh.yaml has all members of the pool."""
    names = {node.name for node in topology.nodes}
    pool_nodes = [node for node in running.nodes if node.pool_members and names.issuperset(node.pool_members)]
    return replace(topology, nodes=(*topology.nodes, *pool_nodes))


def replace_pool_node(running: Topology, name: str, node: NodeSpec | None) -> Topology:
    """``running`` with ``node`` as the node of the pool ``name``; ``None``: without a node of this pool."""
    others = [spec for spec in running.nodes if spec.name != name or not spec.pool_members]
    return replace(running, nodes=(*others, node) if node is not None else tuple(others))
