"""One fault, one finding: what only follows from another finding of the same node is not said. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpumesh.state import Finding, Severity
from gpumesh.topology import NodeSpec

_NO_DRIVER = frozenset({"driver-broken", "driver-hung", "driver-mismatch", "gpu-cgroup-lost"})
_NO_GPU = frozenset({"gpu-lost", "gpu-missing"})
# A finding, and those of which it is a mere consequence.
CAUSES: Mapping[str, frozenset[str]] = {
    "backend-on-cpu": _NO_DRIVER | _NO_GPU,
    "gpu-count": _NO_GPU,
    "gpu-faulty": frozenset({"gpu-lost"}),
    "vram-differs": frozenset({"gpu-differs"}),
    "route-slower": frozenset({"routes-differ"}),
}


def drop_consequences(findings: Iterable[Finding]) -> list[Finding]:
    """Of one node's findings the first of each code, without consequences."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.code, finding)
    return [finding for code, finding in first.items() if not CAUSES.get(code, frozenset()) & first.keys()]


def adjust_severities(spec: NodeSpec, noticed: Sequence[Finding]) -> list[Finding]:
    """What the probes noticed, by what is expected: that there is no NVIDIA GPU is news only where one should be."""
    expect = spec.expect
    wanted = any(value for value in (expect.gpus, expect.gpu, expect.vram_mib, expect.driver))
    weighed = []
    for finding in noticed:
        if finding.code == "gpu-missing" and expect.gpus == 0:
            continue
        if finding.code == "nvidia-smi-missing" and not wanted:
            finding = Finding(  # noqa: PLW2901 - the same one, weighed
                finding.code, Severity.INFO, finding.node, finding.message, finding.hint, finding.nodes
            )
        weighed.append(finding)
    return weighed
