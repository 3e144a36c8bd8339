"""One finding for one fault: drops findings that only follow from another finding of the same node. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpumesh.state import Finding, Severity
from gpumesh.topology import NodeSpec

_NO_DRIVER = frozenset({"driver-broken", "driver-hung", "driver-mismatch", "gpu-cgroup-lost"})
_NO_GPU = frozenset({"gpu-lost", "gpu-missing"})
# A finding with a code on the left is only a consequence of a finding with one of the codes on the right.
CAUSES: Mapping[str, frozenset[str]] = {
    "backend-on-cpu": _NO_DRIVER | _NO_GPU,
    "gpu-count": _NO_GPU,
    "gpu-faulty": frozenset({"gpu-lost"}),
    "vram-differs": frozenset({"gpu-differs"}),
    "route-slower": frozenset({"routes-differ"}),
}


def drop_consequences(findings: Iterable[Finding]) -> list[Finding]:
    """One node's findings without consequences. Of several findings with one code only the first remains."""
    by_code: dict[str, Finding] = {}
    for finding in findings:
        by_code.setdefault(finding.code, finding)
    return [finding for code, finding in by_code.items() if not CAUSES.get(code, frozenset()) & by_code.keys()]


def adjust_severities(spec: NodeSpec, noticed: Sequence[Finding]) -> list[Finding]:
    """The probes' findings (``noticed``), with severities that fit mesh.yaml: a missing NVIDIA GPU matters only where
    mesh.yaml expects a GPU."""
    expect = spec.expect
    gpu_expected = any(value for value in (expect.gpus, expect.gpu, expect.vram_mib, expect.driver))
    adjusted_findings = []
    for finding in noticed:
        if finding.code == "gpu-missing" and expect.gpus == 0:
            continue
        if finding.code == "nvidia-smi-missing" and not gpu_expected:
            finding = Finding(  # noqa: PLW2901 - the same finding, less severe
                finding.code, Severity.INFO, finding.node, finding.message, finding.hint, finding.nodes
            )
        adjusted_findings.append(finding)
    return adjusted_findings
