"""Assesses a node's health, and gives the reason in one sentence, from its tunnel's state and its probes. Pure.

The reason is the first cause (the tunnel before the server), not its consequences.
"""

from __future__ import annotations

from gpumesh.audit.backend import describe_cpu_models
from gpumesh.audit.gpus import describe_gpu_count
from gpumesh.audit.rules import SEVERITY_RANKS
from gpumesh.probes.backend import BackendReport
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.state import BackendPhase, Health, Severity, TunnelPhase, TunnelState
from gpumesh.text.model_names import full_name
from gpumesh.topology import NodeSpec

_GPU_EXPECTATIONS = ("gpus", "gpu", "vram_mib")  # the keys of mesh.yaml's ``expect`` that are about the GPUs


def assess_health(
    tunnel: TunnelState, gpu: GpuReport | None, backend: BackendReport | None, spec: NodeSpec, draining: bool
) -> tuple[Health, str | None]:
    """Returns the node's health and the reason for it, a sentence. ``healthy`` has no reason, every other health has
    one. ``gpu`` and ``backend`` are ``None`` before the first probe."""
    if tunnel.state is not TunnelPhase.UP:
        return _assess_without_tunnel(tunnel)
    if draining:
        return Health.DRAINING, "a person asked for no new work"
    if backend is None:
        return Health.UNKNOWN, "its server has not been asked yet"
    if backend.state.state is not BackendPhase.UP:
        return Health.DOWN, backend.state.last_error or "its server does not answer"
    reason = (
        describe_cpu_models(backend.state.loaded)
        or _describe_gpu_problem(gpu, spec)
        or _describe_missing_models(spec, backend)
    )
    return (Health.HEALTHY, None) if reason is None else (Health.DEGRADED, reason)


def _describe_gpu_problem(gpu: GpuReport | None, spec: NodeSpec) -> str | None:
    """What is wrong with the GPUs of a node whose server is up: the worst finding, or fewer GPUs than mesh.yaml
    expects; ``None`` if nothing is wrong. A warning counts only if mesh.yaml expects something of the GPUs."""
    if gpu is None:
        return None
    has_expectations = any(getattr(spec.expect, name) is not None for name in _GPU_EXPECTATIONS)
    for finding in sorted(gpu.findings, key=lambda finding: SEVERITY_RANKS[finding.severity]):  # errors first
        if finding.severity is Severity.ERROR or (finding.severity is Severity.WARNING and has_expectations):
            return finding.message
    gpus_are_known = gpu.error is None
    if gpus_are_known and spec.expect.gpus is not None and len(gpu.gpus) < spec.expect.gpus:
        return describe_gpu_count(len(gpu.gpus), spec.expect.gpus)
    return None


def _describe_missing_models(spec: NodeSpec, backend: BackendReport) -> str | None:
    """The reason if models that mesh.yaml expects are missing, else ``None``."""
    missing = missing_models(spec, backend)
    return f"expected, but not there: {', '.join(missing)}" if missing else None


def missing_models(spec: NodeSpec, backend: BackendReport) -> tuple[str, ...]:
    """The models that mesh.yaml expects and the server does not list."""
    if not spec.expect.models:
        return ()  # the usual case, which need not read a list of thousands of models
    listed = {full_name(name) for name in backend.state.models}
    return tuple(name for name in spec.expect.models if full_name(name) not in listed)


def _assess_without_tunnel(tunnel: TunnelState) -> tuple[Health, str | None]:
    """The health and the reason of a node whose tunnel is not up."""
    if tunnel.state is TunnelPhase.IDLE:
        return Health.UNKNOWN, "not opened yet"
    if tunnel.state is TunnelPhase.CONNECTING and tunnel.last_error is None:  # no attempt has failed yet
        return Health.UNKNOWN, "connecting"
    if tunnel.state is TunnelPhase.CLOSED:
        return Health.DOWN, "closed"
    return Health.DOWN, tunnel.last_error or "its tunnel is down"
