"""The findings about GPUs that answer nvidia-smi: faulty, throttled (slowed down), persistence mode off. Pure.

smi_failures.py has the findings about an nvidia-smi that fails.
"""

from __future__ import annotations

from gpumesh.probes.smi_tables import GpuTable
from gpumesh.state import Finding, GpuState, Severity

# The reasons for lower clocks (`smi_tables`) that cost speed and have a remedy. A GPU at its own power cap is
# not among them: a person has chosen the cap.
REMEDIABLE_THROTTLES = ("hw-slowdown", "thermal", "hw-thermal", "power-brake")


def find_gpu_problems(table: GpuTable, node: str | None) -> list[Finding]:
    """The findings about GPUs that do answer: at most one finding of each code, which names all GPUs with this
    problem."""
    findings: list[Finding] = []

    def add_finding(code: str, severity: Severity, gpus: list[GpuState], problem: str, hint: str) -> None:
        """Adds the finding about these GPUs, unless there are none."""
        if gpus:
            indexes = ("GPU " if len(gpus) == 1 else "GPUs ") + ", ".join(str(gpu.index) for gpu in gpus)
            findings.append(Finding(code, severity, node, f"{indexes}: {problem}", hint))

    faulty = [gpu for gpu in table.gpus if gpu.uuid in table.faulty_fields]
    fields = sorted({field for gpu in faulty for field in table.faulty_fields[gpu.uuid]})
    add_finding(
        "gpu-faulty",
        Severity.ERROR,
        faulty,
        f"nvidia-smi reads an error for {', '.join(fields)}",
        "look for `NVRM: Xid` in the host's `dmesg`, then reset the GPU (`nvidia-smi -r`) or reboot",
    )
    throttled = [gpu for gpu in table.gpus if _remediable_throttles(gpu)]
    reasons = sorted({reason for gpu in throttled for reason in _remediable_throttles(gpu)})
    add_finding(
        "gpu-throttled",
        Severity.WARNING,
        throttled,
        f"slowed down ({', '.join(reasons)})",
        "check its fans, the air around it and its power supply",
    )
    add_finding(
        "persistence-off",
        Severity.INFO,
        [gpu for gpu in table.gpus if gpu.persistence is False],
        "persistence mode is off, so each idle spell unloads the driver and the next call takes seconds",
        "`nvidia-smi -pm 1` on the host, or the nvidia-persistenced service",
    )
    return findings


def _remediable_throttles(gpu: GpuState) -> list[str]:
    """The reasons for the GPU's lower clocks that cost speed and have a remedy."""
    return [reason for reason in (gpu.throttle or "").split(",") if reason in REMEDIABLE_THROTTLES]
