"""All rules applied to a whole mesh: ``collect_findings``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpumesh.audit import backend, gpus, host, identity, models, routes, tunnel
from gpumesh.audit.causes import adjust_severities, drop_consequences
from gpumesh.state import Finding, NodeState, Severity
from gpumesh.topology import NodeSpec, Topology

_NODE_RULES = (tunnel.check, identity.check, gpus.check, backend.check, models.check, routes.check, host.check)
SEVERITY_RANKS = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


def collect_findings(topology: Topology, nodes: Sequence[NodeState]) -> tuple[Finding, ...]:
    """The findings of the probes and of all rules: worst first, then in the order of mesh.yaml. A node has at most one
    finding of each code, and no finding that is only a consequence of another one."""
    states = {state.name: state for state in nodes}
    pairs = [(spec, states[spec.name]) for spec in topology.nodes if spec.enabled and spec.name in states]
    findings = [finding for spec, state in pairs for finding in check_node(spec, state)]
    identity_findings = list(identity.check_across_nodes(pairs))
    # A node's GPU is known if another node that is the same machine shows it.
    with_known_gpu = {
        name
        for finding in identity_findings
        for name in finding.nodes
        if any(states[other].gpus for other in finding.nodes)
    }
    findings = [
        finding for finding in findings if not (finding.code == "gpu-unknown" and finding.node in with_known_gpu)
    ]
    findings += [*identity_findings, *models.check_across_nodes([state for _, state in pairs])]
    return tuple(sorted(findings, key=lambda finding: SEVERITY_RANKS[finding.severity]))


def check_node(spec: NodeSpec, state: NodeState) -> list[Finding]:
    """The findings about one node by itself, the probes' findings first."""
    of_probes = [replace(finding, node=spec.name) for finding in adjust_severities(spec, state.noticed)]
    of_rules = [finding for rule in _NODE_RULES for finding in rule(spec, state)]
    return drop_consequences([*of_probes, *of_rules])
