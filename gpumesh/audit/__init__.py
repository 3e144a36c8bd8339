"""The audit: compares what mesh.yaml expects with what the probes found, and yields findings. Pure.

Each family of rules has a file. Each fault has one finding: a node whose tunnel is down has no finding about its
models. Some faults are visible only to a probe (a driver's failure, an ERR! in nvidia-smi's table). The probe reports
these as findings (``NodeState.noticed``), and the rules pass them on. ``catalog`` explains the codes of all findings.
"""

from gpumesh.audit.catalog import CATALOG, Explanation, explain
from gpumesh.audit.identity import Machine, Proof, find_machines, gpu_groups, identifying_marks
from gpumesh.audit.rules import collect_findings

__all__ = [
    "CATALOG",
    "Explanation",
    "Machine",
    "Proof",
    "collect_findings",
    "explain",
    "find_machines",
    "gpu_groups",
    "identifying_marks",
]
