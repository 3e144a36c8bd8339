"""All rules over a whole mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpumesh.audit import backend, gpus, host, identity, models, routes, tunnel
from gpumesh.audit.causes import adjust_severities, drop_consequences
from gpumesh.state import Finding, NodeState, Severity
from gpumesh.topology import NodeSpec, Topology

_NODE_RULES = (tunnel.check, identity.check, gpus.check, backend.check, models.check, routes.check, host.check)
_RANK = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


def collect_findings(topology: Topology, nodes: Sequence[NodeState]) -> tuple[Finding, ...]:
    """What the probes noticed and what follows from mesh.yaml: worst first, then in the order of mesh.yaml. For one
    node at most one finding of a code, and none that only follows from another."""
    states = {state.name: state for state in nodes}
    pairs = [(spec, states[spec.name]) for spec in topology.nodes if spec.enabled and spec.name in states]
    found = [finding for spec, state in pairs for finding in check_node(spec, state)]
    shared = list(identity.check_across_nodes(pairs))
    # What GPU a node has is known as soon as another way to it shows it.
    seen = {name for finding in shared for name in finding.nodes if any(states[each].gpus for each in finding.nodes)}
    found = [finding for finding in found if not (finding.code == "gpu-unknown" and finding.node in seen)]
    found += [*shared, *models.check_across_nodes([state for _, state in pairs])]
    return tuple(sorted(found, key=lambda finding: _RANK[finding.severity]))


def check_node(spec: NodeSpec, state: NodeState) -> list[Finding]:
    noticed = [replace(finding, node=spec.name) for finding in adjust_severities(spec, state.noticed)]
    ruled = [finding for rule in _NODE_RULES for finding in rule(spec, state)]
    return drop_consequences([*noticed, *ruled])
