"""All rules over a whole mesh."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.audit import backend, gpus, identity, models, tunnel
from gpumesh.state import Finding, NodeState, Severity
from gpumesh.topology import Topology

_NODE_RULES = (tunnel.check, identity.check, gpus.check, backend.check, models.check)
_RANK = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


def findings(topology: Topology, nodes: Sequence[NodeState]) -> tuple[Finding, ...]:
    """Worst first, then in the order of mesh.yaml. For one node at most one finding of a code."""
    states = {state.name: state for state in nodes}
    pairs = [(spec, states[spec.name]) for spec in topology.nodes if spec.enabled and spec.name in states]
    found = [finding for spec, state in pairs for rule in _NODE_RULES for finding in rule(spec, state)]
    found += identity.across(pairs)
    found += models.across([state for _, state in pairs])
    return tuple(sorted(found, key=lambda finding: _RANK[finding.severity]))
