"""Decides what a running mesh does with each node when its mesh.yaml has changed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpumesh.topology import NodeSpec, Topology


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What happens to the nodes. ``opened`` get a tunnel of their own, unless they are disabled: they are new, or their
    tunnel cannot be used any more. ``kept`` go on, also those whose spec has changed. ``closed`` are the names of the
    running nodes that end: they were removed, or have a successor of the same name in ``opened``. ``reopened`` are the
    names of those whose successor has a tunnel in place of theirs."""

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
    """Compares the nodes of two topologies."""
    has_other_local_ends = running.tunnels != current.tunnels
    specs = {spec.name: spec for spec in running.nodes}
    opened, kept = [], []
    for spec in current.nodes:
        before = specs.get(spec.name)
        if before is None or needs_new_tunnel(before, spec, has_other_local_ends=has_other_local_ends):
            opened.append(spec)
        else:
            kept.append(spec)
    closed = specs.keys() - {spec.name for spec in kept}
    reopened = [spec.name for spec in opened if spec.enabled and spec.name in specs and specs[spec.name].enabled]
    return NodePlan(tuple(opened), tuple(kept), frozenset(closed), tuple(reopened))


def needs_new_tunnel(before: NodeSpec, after: NodeSpec, *, has_other_local_ends: bool = False) -> bool:
    """Whether the change of a node leads to another host or server. Weight, tier, labels, expectations, slots, and the
    kind and the key of its server are changed without a new tunnel."""
    if not before.enabled and not after.enabled:  # it has no tunnel
        return before.ssh != after.ssh or before.backend.targets != after.backend.targets
    return (
        before.enabled != after.enabled
        or before.ssh != after.ssh
        or before.backend.targets != after.backend.targets
        or (has_other_local_ends and after.ssh is not None)
    )
