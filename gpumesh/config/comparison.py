"""Compares what a running mesh has read from mesh.yaml with what the file says now. Pure.

A mesh reads its file once, at its start. A person may edit the file afterwards. So each command that uses both the file
and the running mesh has to ask whether both are the same (``changed_file.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from gpumesh.state import Finding, Severity
from gpumesh.topology import NodeSpec, Topology
from gpumesh.wire import to_json

APPLY_HINT = "`gpumesh down`, then `gpumesh up -d` lets the mesh read the file again"

# The sections of a node that decide which host and server are reached, and how.
_ROUTE_SECTIONS = frozenset({"ssh", "backend", "enabled"})
_EXPECTATION_SECTIONS = frozenset({"expect"})
# ``nodes`` are compared one by one, and ``source`` is the path of the file.
_NOT_MESH_SECTIONS = frozenset({"nodes", "source"})


@dataclass(frozen=True, slots=True)
class ConfigSnapshot:
    """What mesh.yaml said when a mesh read it. ``digest`` is the SHA-256 of the file's bytes then, in hexadecimal;
    ``None``: the mesh was not made from a file."""

    topology: Topology
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class NodeDifference:
    """A node that is in both topologies, and the names of its sections (``ssh``, ``backend`` …) that differ."""

    name: str
    sections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Differences:
    """What is different in the file now. ``added`` are the nodes that only the file has, ``removed`` the nodes that
    only the running mesh has. ``mesh_sections`` are the sections outside of ``nodes`` that differ."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[NodeDifference, ...] = ()
    mesh_sections: tuple[str, ...] = ()

    @property
    def change_routes(self) -> bool:
        """Whether the file leads to other hosts or servers than those that the running mesh has reached."""
        other_routes = any(_ROUTE_SECTIONS.intersection(node.sections) for node in self.changed)
        return bool(self.added or self.removed) or other_routes or "tunnels" in self.mesh_sections

    @property
    def change_expectations_only(self) -> bool:
        """Whether the mesh would run as it does now: only what `audit` expects of its nodes has changed."""
        is_elsewhere = self.added or self.removed or self.mesh_sections
        return not is_elsewhere and all(_EXPECTATION_SECTIONS.issuperset(node.sections) for node in self.changed)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.mesh_sections)

    def __str__(self) -> str:
        """The differences as a list for a sentence."""
        parts = [f"{name} is not in the running mesh" for name in self.added]
        parts += [f"{name} is not in mesh.yaml any more" for name in self.removed]
        parts += [f"{node.name} has another {' and '.join(node.sections)}" for node in self.changed]
        parts += [f"another {section}" for section in self.mesh_sections]
        return "; ".join(parts)


def compare_topologies(running: Topology, current: Topology) -> Differences:
    """The differences of ``current``, which the file says now, from ``running``. Pure. The order of nodes, comments and
    the file's path do not count."""
    running_nodes = {node.name: node for node in running.nodes}
    current_nodes = {node.name: node for node in current.nodes}
    changed = []
    for name, node in current_nodes.items():
        sections = _differing_fields(running_nodes.get(name, node), node)
        if sections:
            changed.append(NodeDifference(name, sections))
    return Differences(
        added=tuple(name for name in current_nodes if name not in running_nodes),
        removed=tuple(name for name in running_nodes if name not in current_nodes),
        changed=tuple(changed),
        mesh_sections=tuple(name for name in _differing_fields(running, current) if name not in _NOT_MESH_SECTIONS),
    )


def _differing_fields(first: NodeSpec | Topology, second: NodeSpec | Topology) -> tuple[str, ...]:
    """The names of the fields whose values differ. The values are compared in the form in which a running mesh sends
    them (JSON), so that a tuple equals a list."""
    names = tuple(field.name for field in fields(first))
    return tuple(name for name in names if to_json(getattr(first, name)) != to_json(getattr(second, name)))


def describe_differences(differences: Differences) -> Finding | None:
    """The finding about a file that is not what runs; ``None`` if there is no difference. A remark if the mesh would
    run as it does now, else a warning."""
    if not differences:
        return None
    severity = Severity.INFO if differences.change_expectations_only else Severity.WARNING
    return changed_file_finding(f"mesh.yaml was changed after the running mesh had read it: {differences}", severity)


def changed_file_finding(message: str, severity: Severity = Severity.WARNING) -> Finding:
    return Finding("config-changed", severity, None, message, APPLY_HINT)
