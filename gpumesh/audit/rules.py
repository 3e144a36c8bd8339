"""Applies all rules of the audit to a whole mesh, or to one node, and sorts the findings by severity. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpumesh.audit import backend, gpus, host, identity, loading, models, routes, tunnel
from gpumesh.audit.causes import adjust_severities, drop_consequences
from gpumesh.state import Finding, NodeState, Severity
from gpumesh.topology import NodeSpec, Topology

_NODE_RULES = (
    tunnel.check,
    identity.check,
    gpus.check,
    backend.check,
    models.check,
    loading.check,
    routes.check,
    host.check,
)
SEVERITY_RANKS = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}  # the order of sorting: 0 comes first


def collect_findings(topology: Topology, nodes: Sequence[NodeState]) -> tuple[Finding, ...]:
    """Returns the findings of the probes and of all rules, the worst first.

    Within one severity, findings about single nodes come first, in the order of mesh.yaml, then findings about several
    nodes. Only nodes that are enabled and have a state are checked. A node has at most one finding of each code, and no
    finding that is only a consequence of another finding.
    """
    states = {state.name: state for state in nodes}
    pairs = [(spec, states[spec.name]) for spec in topology.nodes if spec.enabled and spec.name in states]
    identity_findings = list(identity.check_across_nodes(pairs))
    nodes_with_known_gpu: set[str] = set()
    for finding in identity_findings:
        # These nodes are one machine: so if one of them shows its GPU, the GPU of all of them is known, and the finding
        # gpu-unknown of the others would be wrong.
        if any(states[name].gpus for name in finding.nodes):
            nodes_with_known_gpu.update(finding.nodes)
    findings: list[Finding] = []
    for spec, state in pairs:
        # The host of a pool's node is that of one of its members, which has the finding already.
        member_findings = {
            finding.code for name in spec.pool_members if name in states for finding in states[name].noticed
        }
        for finding in check_node(spec, state):
            is_wrong = finding.code == "gpu-unknown" and finding.node in nodes_with_known_gpu
            if not is_wrong and finding.code not in member_findings:
                findings.append(finding)
    findings += identity_findings
    findings += models.check_across_nodes([state for _spec, state in pairs])
    # ``sorted`` keeps the order of equals.
    return tuple(sorted(findings, key=lambda finding: SEVERITY_RANKS[finding.severity]))


def check_node(spec: NodeSpec, state: NodeState) -> list[Finding]:
    """Returns the findings about one node by itself, without mere consequences: those of the probes first."""
    probe_findings = [replace(finding, node=spec.name) for finding in adjust_severities(spec, state.noticed)]
    rule_findings = [finding for rule in _NODE_RULES for finding in rule(spec, state)]
    return drop_consequences([*probe_findings, *rule_findings])
