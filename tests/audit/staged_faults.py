"""What a staged fault is, and the states that faults are staged with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpumesh import errors
from gpumesh.errors import ProbeError
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    GpuState,
    LoadedModel,
    NodeState,
    Severity,
)
from gpumesh.topology import ExpectSpec, NodeSpec
from tests.audit.build import (
    GPU,
    UUID_B,
    backend,
    direct,
    spec,
    state,
)

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
ON_CPU = backend(loaded=(LoadedModel("qwen2.5:7b", 0, 5120),))
MIG = replace(GPU, memory_total_mib=9856, name="NVIDIA GeForce RTX 4090")
HUNG = GpuReport(error="hung", findings=(Finding("driver-hung", ERROR, None, "nvidia-smi did not answer", "reboot"),))
OLD_KEY = errors.HostKeyChanged("the host key of x is …", hint="`gpumesh trust iceland` records the new key knowingly")
PARTLY_ON_CPU = backend(models=("qwen2.5:7b", "llama3:70b"), loaded=(LoadedModel("llama3:70b", 20480, 40960),))
GPU_WITHOUT_FIGURES = GpuState(0, GPU.uuid, GPU.name, 24564)


@dataclass(frozen=True)
class Fault:
    """The specs and states of a fault, and the finding it gives: ``message`` and ``hint`` are parts of its texts."""

    specs: tuple[NodeSpec, ...]
    states: tuple[NodeState, ...]
    code: str
    severity: Severity
    message: str
    hint: str


def node_fault(
    state: NodeState, code: str, severity: Severity, message: str, hint: str, like: NodeSpec | None = None
) -> Fault:
    """A fault of one node."""
    return Fault((like or spec(),), (state,), code, severity, message, hint)


def pair_fault(
    first: NodeState, second: NodeState, code: str, message: str, hint: str, like: NodeSpec | None = None
) -> Fault:
    """A fault that concerns two nodes. ``like`` is the spec of the second."""
    specs = (spec(), like or replace(direct(), expect=ExpectSpec()))
    return Fault(specs, (first, replace(second, name=specs[1].name)), code, WARNING, message, hint)


def state_with_probe_error(error: ProbeError, like: NodeState | None = None) -> NodeState:
    """A node whose server does not serve, as the probe in probes/backend.py reports it."""
    finding = Finding(error.finding_code, ERROR, "iceland", error.message, error.hint)
    down = BackendState("ollama", BackendPhase.DOWN, last_error=error.message, error_code=error.finding_code)
    return replace(like or state(), backend=down, noticed=(finding,))


def on_another_machine(node: NodeState) -> NodeState:
    """The node with marks that no other node has."""
    return replace(
        node,
        tunnel=replace(node.tunnel, host_keys=()),
        gpus=(replace(GPU, uuid=UUID_B),),
        backend=replace(
            node.backend,
            catalog=tuple(replace(model, modified_at="2026-01-01T00:00:00.5Z") for model in node.backend.catalog),
        ),
    )
