"""One node, one true reason: the cause nearest to the ground."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gpumesh.probes.backend import BackendReport
from gpumesh.probes.health import assess_health, missing_models
from gpumesh.probes.nvidia_smi import Answer, GpuReport
from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    GpuState,
    Health,
    LoadedModel,
    Severity,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import BackendSpec, ExpectSpec, NodeSpec

UP = TunnelState("sshtunnel", TunnelPhase.UP)
GPU = GpuState(0, "GPU-8f2c1d5e-3b6a", "NVIDIA GeForce RTX 4090")


def backend(*models: str, loaded: tuple[LoadedModel, ...] = ()) -> BackendReport:
    return BackendReport(BackendState("ollama", BackendPhase.UP, models=models, loaded=loaded))


NO_EXPECTATION = ExpectSpec()


def finding(code: str, severity: Severity) -> Finding:
    return Finding(code, severity, "iceland", f"{code} happened")


def tunnel(phase: TunnelPhase, error: str | None = None) -> TunnelState:
    return TunnelState("sshtunnel", phase, last_error=error)


@dataclass(frozen=True)
class Case:
    health: Health
    reason: str | None
    tunnel: TunnelState = UP
    gpu: GpuReport | None = field(default_factory=lambda: GpuReport((GPU,)))
    backend: BackendReport | None = field(default_factory=lambda: backend("qwen2.5:7b"))
    expect: ExpectSpec = NO_EXPECTATION
    draining: bool = False


SPILLED = LoadedModel("llama3:70b", size_vram_mib=20_000, size_mib=40_000)
DOWN = BackendReport(BackendState("ollama", BackendPhase.DOWN, last_error="nothing listens"))
SILENT = BackendReport(BackendState("ollama", BackendPhase.DOWN))
NO_DRIVER = GpuReport(error="no driver", findings=(finding("driver-broken", Severity.ERROR),))
NO_SMI = GpuReport(error="none", findings=(finding("nvidia-smi-missing", Severity.WARNING),))
NO_COMMANDS = GpuReport(error="runs none", findings=(finding("gpu-unknown", Severity.INFO),), answer=Answer.NO_COMMANDS)
SLOW_SHELL = GpuReport(error="slow", findings=(finding("login-shell-slow", Severity.WARNING),))
BOTH = GpuReport((GPU,), findings=(finding("persistence-off", Severity.INFO), finding("gpu-faulty", Severity.ERROR)))
EXPECTS_GPU = ExpectSpec(gpus=1)

CASES = {
    "all is well": Case(Health.HEALTHY, None),
    "GPUs not asked yet": Case(Health.HEALTHY, None, gpu=None),
    "not opened": Case(Health.UNKNOWN, "not opened yet", tunnel(TunnelPhase.IDLE)),
    "connecting": Case(Health.UNKNOWN, "connecting", tunnel(TunnelPhase.CONNECTING)),
    "connecting again": Case(Health.DOWN, "refused", tunnel(TunnelPhase.CONNECTING, "refused")),
    "in backoff": Case(Health.DOWN, "refused", tunnel(TunnelPhase.BACKOFF, "refused")),
    "a person must act": Case(Health.DOWN, "key changed", tunnel(TunnelPhase.FAILED, "key changed")),
    "failed without a word": Case(Health.DOWN, "its tunnel is down", tunnel(TunnelPhase.FAILED)),
    "closed": Case(Health.DOWN, "closed", tunnel(TunnelPhase.CLOSED, "refused")),
    "the tunnel before the server": Case(Health.DOWN, "refused", tunnel(TunnelPhase.BACKOFF, "refused"), backend=DOWN),
    "draining": Case(Health.DRAINING, "a person asked for no new work", draining=True),
    "draining, but down": Case(Health.DOWN, "gone", tunnel(TunnelPhase.BACKOFF, "gone"), draining=True),
    "server not asked": Case(Health.UNKNOWN, "its server has not been asked yet", backend=None),
    "server down": Case(Health.DOWN, "nothing listens", backend=DOWN),
    "server silent": Case(Health.DOWN, "its server does not answer", backend=SILENT),
    "server before GPU": Case(Health.DOWN, "nothing listens", backend=DOWN, gpu=NO_DRIVER),
    "driver broken": Case(Health.DEGRADED, "driver-broken happened", gpu=NO_DRIVER),
    "no nvidia-smi, none wanted": Case(Health.HEALTHY, None, gpu=NO_SMI),
    "no nvidia-smi, a GPU wanted": Case(Health.DEGRADED, "nvidia-smi-missing happened", gpu=NO_SMI, expect=EXPECTS_GPU),
    "an account that runs no commands, a GPU wanted": Case(Health.HEALTHY, None, gpu=NO_COMMANDS, expect=EXPECTS_GPU),
    "a slow login shell, no GPU wanted": Case(Health.HEALTHY, None, gpu=SLOW_SHELL),
    "a slow login shell, a GPU wanted": Case(
        Health.DEGRADED, "login-shell-slow happened", gpu=SLOW_SHELL, expect=EXPECTS_GPU
    ),
    "the worst finding counts": Case(Health.DEGRADED, "gpu-faulty happened", gpu=BOTH),
    "too few GPUs": Case(Health.DEGRADED, "1 GPU is there, expected were 2", expect=ExpectSpec(gpus=2)),
    "more GPUs than wanted": Case(Health.HEALTHY, None, gpu=GpuReport((GPU, GPU)), expect=EXPECTS_GPU),
    "on the CPU": Case(
        Health.DEGRADED, "runs on the CPU: llama3:70b (50 %)", backend=backend("llama3:70b", loaded=(SPILLED,))
    ),
    "a model is missing": Case(
        Health.DEGRADED,
        "expected, but not there: llama3:8b, phi3",
        expect=ExpectSpec(models=("llama3:8b", "QWEN2.5:7B", "phi3")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_health_and_its_reason(name: str) -> None:
    case = CASES[name]
    spec = NodeSpec("iceland", BackendSpec(), expect=case.expect)
    assert assess_health(case.tunnel, case.gpu, case.backend, spec, case.draining) == (case.health, case.reason)


@pytest.mark.parametrize(
    ("wanted", "there", "missing"),
    [
        ("qwen2.5", "qwen2.5:latest", ()),
        ("qwen2.5:latest", "qwen2.5", ()),
        ("Qwen2.5:7B ", "qwen2.5:7b", ()),
        ("host:5000/m", "host:5000/m:latest", ()),
        ("qwen2.5", "qwen2.5:7b", ("qwen2.5",)),
    ],
)
def test_missing_models_by_full_name(wanted: str, there: str, missing: tuple[str, ...]) -> None:
    spec = NodeSpec("iceland", BackendSpec(), expect=ExpectSpec(models=(wanted,)))
    assert missing_models(spec, backend(there)) == missing


@pytest.mark.parametrize(
    "model",
    [
        LoadedModel("m"),
        LoadedModel("m", size_vram_mib=5),
        LoadedModel("m", size_mib=5),
        LoadedModel("m", 5000, 5000),
        LoadedModel("m", 4999, 5000),
        LoadedModel("m", 6000, 5000),
        LoadedModel("m", 0, 0),
    ],
)
def test_a_model_on_the_gpu_or_of_unknown_place_is_no_fault(model: LoadedModel) -> None:
    spec = NodeSpec("iceland", BackendSpec())
    assert assess_health(UP, None, backend(loaded=(model,)), spec, draining=False) == (Health.HEALTHY, None)
