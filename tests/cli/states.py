"""Hand-made snapshots, as probes would give them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    GatewayPhase,
    GatewayState,
    GpuState,
    Health,
    HostState,
    LoadedModel,
    LoadState,
    MeshState,
    ModelInfo,
    NodeState,
    ProcessState,
    Severity,
    TunnelPhase,
    TunnelState,
    compute_totals,
)

AT = datetime(2026, 11, 24, 4, 10, tzinfo=UTC)


def gpu(index: int = 0, *, name: str = "NVIDIA GeForce RTX 4090", used: int | None = 5632, busy: int = 42) -> GpuState:
    return GpuState(
        index=index,
        uuid=f"GPU-{name}-{index}-{used}",
        name=name,
        memory_total_mib=24564,
        memory_used_mib=used,
        memory_free_mib=None if used is None else 24100 - used,
        utilization_pct=busy,
        temperature_c=61,
        power_w=212.5,
        power_limit_w=450.0,
        processes=(ProcessState(4711, "/usr/bin/ollama runner", 5120),),
    )


def healthy(name: str, *, gpus: tuple[GpuState, ...] | None = None, rate: float | None = 73.1) -> NodeState:
    return NodeState(
        name=name,
        health=Health.HEALTHY,
        reason=None,
        tunnel=TunnelState(
            "sshtunnel", TunnelPhase.UP, since=AT - timedelta(minutes=4), rtt_ms=41.2, local_port=40123, reconnects=1
        ),
        backend=BackendState(
            "ollama",
            BackendPhase.UP,
            url="http://127.0.0.1:40123",
            version="0.12.6",
            models=("qwen2.5:7b", "nomic-embed-text:latest"),
            loaded=(LoadedModel("qwen2.5:7b", 5120, 5120, AT + timedelta(minutes=4)),),
            latency_ms=42.0,
            tokens_per_s=rate,
            catalog=(
                ModelInfo("qwen2.5:7b", "d1", 4466, family="qwen2"),
                ModelInfo("nomic-embed-text:latest", "d2", 262, family="nomic-bert"),
            ),
        ),
        host=HostState("af4a84245990", "550.54.15"),
        gpus=(gpu(),) if gpus is None else gpus,
        load=LoadState(in_flight=1, queued=2, limit=1, served=120),
    )


def down(
    name: str, reason: str = "nothing listens on 203.0.113.7:22", *, hint: str | None = "is the pod running?"
) -> NodeState:
    return NodeState(
        name=name,
        health=Health.DOWN,
        reason=reason,
        tunnel=TunnelState(
            "sshtunnel",
            TunnelPhase.BACKOFF,
            last_error=reason,
            error_code="connect-refused",
            hint=hint,
            retry_in_s=4.2,
        ),
        backend=BackendState("ollama"),
    )


def mesh(*nodes: NodeState, findings: tuple[Finding, ...] = ()) -> MeshState:
    return MeshState(
        mesh="home",
        at=AT,
        gateway=GatewayState("http://127.0.0.1:11430", GatewayPhase.SERVING, in_flight=1),
        totals=compute_totals(nodes),
        nodes=nodes,
        findings=findings,
    )


def typical() -> MeshState:
    """One node that works, one with two GPUs that is degraded, one that is down, one that drains."""
    two = (gpu(0, used=20480, busy=97), gpu(1, name="NVIDIA H100 80GB HBM3", used=None, busy=3))
    return mesh(
        healthy("iceland"),
        replace(
            healthy("vengeance", gpus=two, rate=8.25), health=Health.DEGRADED, reason="one of 2 GPUs is on the CPU"
        ),
        down("runpod"),
        replace(healthy("attic", gpus=()), health=Health.DRAINING),
        findings=(
            Finding(
                "gpu-missing",
                Severity.WARNING,
                "vengeance",
                "mesh.yaml expects 3 GPUs, 2 are there",
                "if that is right, set expect.gpus: 2",
            ),
        ),
    )
