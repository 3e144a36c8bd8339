"""A node's health with its one true reason: the cause nearest to the ground, not what follows from it. Pure."""

from __future__ import annotations

from gpumesh.audit.backend import describe_cpu_models
from gpumesh.audit.gpus import describe_gpu_count
from gpumesh.model_names import full_name
from gpumesh.probes.backend import BackendReport
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.state import BackendPhase, Health, Severity, TunnelPhase, TunnelState
from gpumesh.topology import NodeSpec

# Findings that say that the GPU is not, or not wholly, usable: the node serves, but nobody knows how well.
_ABOUT_EXPECTED = ("gpus", "gpu", "vram_mib")


def assess_health(
    tunnel: TunnelState, gpu: GpuReport | None, backend: BackendReport | None, spec: NodeSpec, draining: bool
) -> tuple[Health, str | None]:
    """``healthy`` has no reason; all else has one sentence."""
    if tunnel.state is not TunnelPhase.UP:
        return _without_tunnel(tunnel)
    if draining:
        return Health.DRAINING, "a person asked for no new work"
    if backend is None:
        return Health.UNKNOWN, "its server has not been asked yet"
    if backend.state.state is not BackendPhase.UP:
        return Health.DOWN, backend.state.last_error or "its server does not answer"
    slow = describe_cpu_models(backend.state.loaded)
    if slow is not None:
        return Health.DEGRADED, slow
    if gpu is not None:
        for finding in sorted(gpu.findings, key=lambda one: _RANK[one.severity]):
            expected = any(getattr(spec.expect, name) is not None for name in _ABOUT_EXPECTED)
            if finding.severity is Severity.ERROR or (finding.severity is Severity.WARNING and expected):
                return Health.DEGRADED, finding.message
        if gpu.error is None and spec.expect.gpus is not None and len(gpu.gpus) < spec.expect.gpus:
            return Health.DEGRADED, describe_gpu_count(len(gpu.gpus), spec.expect.gpus)
    missing = missing_models(spec, backend)
    if missing:
        return Health.DEGRADED, f"expected, but not there: {', '.join(missing)}"
    return Health.HEALTHY, None


_RANK = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


def missing_models(spec: NodeSpec, backend: BackendReport) -> tuple[str, ...]:
    if not spec.expect.models:
        return ()  # the usual case, and a server may list thousands
    there = {full_name(name) for name in backend.state.models}
    return tuple(name for name in spec.expect.models if full_name(name) not in there)


def _without_tunnel(tunnel: TunnelState) -> tuple[Health, str | None]:
    if tunnel.state is TunnelPhase.IDLE:
        return Health.UNKNOWN, "not opened yet"
    if tunnel.state is TunnelPhase.CONNECTING and tunnel.last_error is None:
        return Health.UNKNOWN, "connecting"
    if tunnel.state is TunnelPhase.CLOSED:
        return Health.DOWN, "closed"
    return Health.DOWN, tunnel.last_error or "its tunnel is down"
