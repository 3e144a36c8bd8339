"""Drops findings that only follow from another finding of the same node, and lowers severities by mesh.yaml. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gpumesh.state import Finding, Severity
from gpumesh.topology import NodeSpec

_NO_DRIVER = frozenset({"driver-broken", "driver-hung", "driver-mismatch", "gpu-cgroup-lost"})
_NO_GPU = frozenset({"gpu-lost", "gpu-missing"})
# A finding with a code on the left is only a consequence if the node also has a finding with a code on the right. For
# example, all models run on the CPU because the driver is broken.
CAUSES: Mapping[str, frozenset[str]] = {
    "backend-on-cpu": _NO_DRIVER | _NO_GPU,
    "node-slow": frozenset({"backend-on-cpu"}) | _NO_DRIVER | _NO_GPU,
    "gpu-count": _NO_GPU,
    "gpu-faulty": frozenset({"gpu-lost"}),
    "vram-differs": frozenset({"gpu-differs"}),
    "route-slower": frozenset({"routes-differ"}),
}


def drop_consequences(findings: Iterable[Finding]) -> list[Finding]:
    """Returns one node's findings without mere consequences (``CAUSES``), and only the first finding of each code."""
    first_by_code: dict[str, Finding] = {}
    for finding in findings:
        first_by_code.setdefault(finding.code, finding)
    remaining: list[Finding] = []
    for code, finding in first_by_code.items():
        causes_found = CAUSES.get(code, frozenset()) & first_by_code.keys()
        if not causes_found:
            remaining.append(finding)
    return remaining


def adjust_severities(spec: NodeSpec, noticed: Sequence[Finding]) -> list[Finding]:
    """Returns the probes' findings (``noticed``) with severities that fit the ``expect`` of mesh.yaml.

    ``gpu-missing`` is left out if mesh.yaml says ``gpus: 0``. ``nvidia-smi-missing`` becomes an INFO if no key of
    mesh.yaml asks for a GPU: a host without an NVIDIA GPU has no nvidia-smi.
    """
    expect = spec.expect
    # Whether one of these keys asks for a GPU: a missing key and ``gpus: 0`` do not.
    gpu_expected = any((expect.gpus, expect.gpu, expect.vram_mib, expect.driver))
    adjusted_findings: list[Finding] = []
    for finding in noticed:
        if finding.code == "gpu-missing" and expect.gpus == 0:
            continue
        if finding.code == "nvidia-smi-missing" and not gpu_expected:
            adjusted_findings.append(replace(finding, severity=Severity.INFO))
        else:
            adjusted_findings.append(finding)
    return adjusted_findings
