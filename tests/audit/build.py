"""Specs and states by hand, and states as the probes make them of what a host says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpumesh import audit
from gpumesh.errors import TunnelError
from gpumesh.probes.commands.combined_commands import CommandOutput
from gpumesh.probes.nvidia_smi import build_gpu_report
from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    GpuState,
    Health,
    HostState,
    LoadedModel,
    LoadingState,
    ModelInfo,
    ModelLoadsState,
    NodeState,
    RouteState,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import BackendKind, BackendSpec, ExpectSpec, NodeSpec, SshSpec, Target, Topology
from tests.probes.shell_host import row

UUID_A = "GPU-8f2c1d5e-3b6a-4c1f-9a77-0a1b2c3d4e5f"
UUID_B = "GPU-31bd7a90-55aa-4e0e-8c11-9d8c7b6a5f4e"
GPU = GpuState(0, UUID_A, "NVIDIA GeForce RTX 4090", 24564, 5632, 18560, persistence=True)
OTHER = replace(GPU, index=1, uuid=UUID_B)
STORED = "2026-08-01T12:00:00.123456789+02:00"
MODEL = ModelInfo("qwen2.5:7b", "845dbda0ea48", 4466, STORED)
KEY = "SHA256:vNTJzdXUfnqNSjaa0a3yBm8Iio8lKNbuXvhsp9oBYmw"
EXPECT = ExpectSpec("af4a84245990", 1, "NVIDIA GeForce RTX 4090", 24564, "550", ("qwen2.5:7b",))


def spec(name: str = "iceland", **changes: Any) -> NodeSpec:
    """Behind SSH, with everything expected that ``state`` has."""
    made = NodeSpec(
        name, BackendSpec(targets=(Target("127.0.0.1", 80),)), ssh=SshSpec("203.0.113.7", 13323), expect=EXPECT
    )
    return replace(made, **changes)


def direct(name: str = "local", *urls: str) -> NodeSpec:
    targets = tuple(
        Target(url.split("://")[1].split(":")[0], int(url.rsplit(":", 1)[1]))
        for url in urls or ("http://127.0.0.1:11434",)
    )
    return NodeSpec(name, BackendSpec(targets=targets))


def state(name: str = "iceland", **changes: Any) -> NodeState:
    """Of a node that is as ``spec`` expects it."""
    made = NodeState(
        name=name,
        health=Health.HEALTHY,
        reason=None,
        tunnel=TunnelState("sshtunnel", TunnelPhase.UP, rtt_ms=41.2),
        backend=BackendState(
            "ollama",
            BackendPhase.UP,
            url="http://127.0.0.1:40123",
            version="0.12.6",
            models=("qwen2.5:7b",),
            catalog=(MODEL,),
            loaded=(LoadedModel("qwen2.5:7b", 5120, 5120),),
            latency_ms=42.0,
        ),
        host=HostState("af4a84245990", "550.54.15"),
        gpus=(GPU,),
        routes=(RouteState("http://127.0.0.1:80", "http://127.0.0.1:40123", "sshtunnel"),),
    )
    return replace(made, **changes)


def backend(**changes: Any) -> BackendState:
    return replace(state().backend, **changes)


def state_with_routes(*routes: RouteState) -> NodeState:
    """After `audit` has asked each way; the first of them is in use."""
    return state(backend=backend(url=routes[0].url), routes=routes)


def route(target: str, **changes: Any) -> RouteState:
    made = RouteState(target, target, "direct", BackendPhase.UP, latency_ms=40.0, store="store:1", kind="ollama")
    return replace(made, **changes)


def without_gpus(made: NodeState) -> NodeState:
    """The same, where nvidia-smi cannot be asked."""
    return replace(made, gpus=None, host=HostState())


def state_with_error(error: TunnelError, *, phase: TunnelPhase | None = None) -> NodeState:
    """A node whose tunnel failed so."""
    failed = phase or (TunnelPhase.FAILED if error.needs_person else TunnelPhase.BACKOFF)
    tunnel = TunnelState(
        "sshtunnel", failed, last_error=error.message, error_code=error.code, hint=error.hint, retry_in_s=1.0
    )
    return NodeState("iceland", Health.DOWN, error.message, tunnel, BackendState("ollama"))


def state_with_smi_output(text: str = "", status: int = 0, *, apps: str = "", **changes: Any) -> NodeState:
    """A node whose nvidia-smi says that."""
    report = build_gpu_report(
        CommandOutput(status, (text or row()).encode()),
        CommandOutput(0, apps.encode()),
        hostname="af4a84245990",
        node="iceland",
    )
    host = HostState(report.hostname, report.driver)
    made = state(gpus=None if report.error is not None else report.gpus, noticed=report.findings, host=host)
    return replace(made, **changes)


def state_with_findings(*findings: Finding, **changes: Any) -> NodeState:
    return state(noticed=findings, **changes)


def topology(*specs: NodeSpec) -> Topology:
    return Topology("home", specs)


def audit_findings(specs: NodeSpec | Sequence[NodeSpec], *states: NodeState) -> tuple[Finding, ...]:
    every = (specs,) if isinstance(specs, NodeSpec) else tuple(specs)
    return audit.collect_findings(topology(*every), states)


def with_openai_kind(made: NodeSpec) -> NodeSpec:
    return replace(made, backend=replace(made.backend, kind=BackendKind.OPENAI))


def loading(load_s: float, *models: tuple[str, int, tuple[int | None, ...]], window_s: float = 100.0) -> LoadingState:
    """The loads of these models: name, number of loads, contexts."""
    states = tuple(ModelLoadsState(name, loads, contexts) for name, loads, contexts in models)
    return LoadingState(window_s, load_s, sum(model.loads for model in states), states)
