"""Staged faults, each at the level of specs and states: each gives its own finding with a hint that can be acted on,
and none gives two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from gpumesh import errors
from gpumesh.audit import CATALOG
from gpumesh.backends import unusable_answers
from gpumesh.errors import ProbeError
from gpumesh.probes import wrong_server
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.probes.smi_tables import FIELDS
from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    GpuState,
    HostState,
    LoadedModel,
    ModelInfo,
    NodeState,
    Severity,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import ExpectSpec, NodeSpec
from tests.audit.build import (
    GPU,
    KEY,
    MODEL,
    OTHER,
    UUID_B,
    audit_findings,
    backend,
    direct,
    route,
    spec,
    state,
    state_with_error,
    state_with_findings,
    state_with_routes,
    state_with_smi_output,
    without_gpus,
)
from tests.probes.shell_host import row

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
ON_CPU = backend(loaded=(LoadedModel("qwen2.5:7b", 0, 5120),))


@dataclass(frozen=True)
class Fault:
    """What mesh.yaml says and what is there; the code, its severity, words of the message and of the hint."""

    specs: tuple[NodeSpec, ...]
    states: tuple[NodeState, ...]
    code: str
    severity: Severity
    message: str
    hint: str


def one(made: NodeState, code: str, severity: Severity, message: str, hint: str, like: NodeSpec | None = None) -> Fault:
    return Fault((like or spec(),), (made,), code, severity, message, hint)


def two(first: NodeState, second: NodeState, code: str, message: str, hint: str, like: NodeSpec | None = None) -> Fault:
    specs = (spec(), like or replace(direct(), expect=ExpectSpec()))
    return Fault(specs, (first, replace(second, name=specs[1].name)), code, WARNING, message, hint)


def probed(error: ProbeError, like: NodeState | None = None) -> NodeState:
    """As probes/backend.py tells a server that does not serve."""
    told = Finding(error.finding_code, ERROR, "iceland", error.message, error.hint)
    down = BackendState("ollama", BackendPhase.DOWN, last_error=error.message, error_code=error.finding_code)
    return replace(like or state(), backend=down, noticed=(told,))


def a_stranger(made: NodeState) -> NodeState:
    """A node on another machine: nothing that it is known by is the first one's."""
    return replace(
        made,
        tunnel=replace(made.tunnel, host_keys=()),
        gpus=(replace(GPU, uuid=UUID_B),),
        backend=replace(
            made.backend,
            catalog=tuple(replace(one, modified_at="2026-01-01T00:00:00.5Z") for one in made.backend.catalog),
        ),
    )


MIG = replace(GPU, memory_total_mib=9856, name="NVIDIA GeForce RTX 4090")
HUNG = GpuReport(error="hung", findings=(Finding("driver-hung", ERROR, None, "nvidia-smi did not answer", "reboot"),))
OLD_KEY = errors.HostKeyChanged("the host key of x is …", hint="`gpumesh trust iceland` records the new key knowingly")
SPILLED = backend(models=("qwen2.5:7b", "llama3:70b"), loaded=(LoadedModel("llama3:70b", 20480, 40960),))
FEWER = GpuState(0, GPU.uuid, GPU.name, 24564)

FAULTS = {
    # -- reaching the host
    "host off": one(
        state_with_error(errors.ConnectTimeout("no answer within 8 s")), "node-unreachable", ERROR, "8 s", "firewall"
    ),
    "port changed": one(
        state_with_error(errors.ConnectRefused("refused")), "node-unreachable", ERROR, "refused", "`ssh.port`"
    ),
    "name unknown": one(
        state_with_error(errors.HostUnresolved("unknown")), "node-unreachable", ERROR, "unknown", "`ssh.host`"
    ),
    "network down": one(
        state_with_error(errors.HostUnreachable("no route")), "node-unreachable", ERROR, "route", "network"
    ),
    "a web server on the SSH port": one(
        state_with_error(errors.NotSsh("HTTP")), "node-unreachable", ERROR, "HTTP", "`ssh.port`"
    ),
    "connection lost": one(
        state_with_error(errors.TunnelLost("reset")), "node-unreachable", ERROR, "reset", "ssh -p 13323"
    ),
    "key refused": one(
        state_with_error(errors.AuthRefused("refused", hint="put it into authorized_keys")),
        "auth-refused",
        ERROR,
        "",
        "authorized",
    ),
    "host key changed": one(state_with_error(OLD_KEY), "host-key-changed", ERROR, "host key", "gpumesh trust iceland"),
    "host key unknown": one(
        state_with_error(errors.HostKeyUnknown("not known", hint="`gpumesh trust`")),
        "host-key-unknown",
        ERROR,
        "",
        "trust",
    ),
    "host key revoked": one(
        state_with_error(errors.HostKeyRevoked("revoked", hint="whoever marked it")),
        "host-key-revoked",
        ERROR,
        "",
        "marked",
    ),
    "key file missing": one(
        state_with_error(errors.KeyUnreadable("no such file", hint="`ssh.identity_file`")),
        "key-unreadable",
        ERROR,
        "",
        "identity",
    ),
    "password not set": one(
        state_with_error(errors.SecretMissing("$PW is not set", hint="export PW")),
        "secret-missing",
        ERROR,
        "$PW",
        "export",
    ),
    "forwarding forbidden": one(
        state_with_error(errors.ForwardingForbidden("no", hint="AllowTcpForwarding")),
        "forwarding-forbidden",
        ERROR,
        "",
        "Allow",
    ),
    "a proxy of terminals": one(
        state_with_error(errors.TransportUnsupported("no", hint="exposed TCP")),
        "transport-unsupported",
        ERROR,
        "",
        "exposed TCP",
    ),
    # -- the GPU, as nvidia-smi tells it
    "no driver": one(state_with_smi_output(NO_DRIVER, 9), "driver-broken", ERROR, "communicate", "modprobe nvidia"),
    "no driver, and so on the CPU": one(
        state_with_smi_output(NO_DRIVER, 9, backend=ON_CPU), "driver-broken", ERROR, "communicate", "modprobe nvidia"
    ),
    "driver updated under it": one(
        state_with_smi_output("Failed to initialize NVML: Driver/library version mismatch", 18),
        "driver-mismatch",
        ERROR,
        "",
        "reboot",
    ),
    "container without its cgroup": one(
        state_with_smi_output("Failed to initialize NVML: Unknown Error", 255),
        "gpu-cgroup-lost",
        ERROR,
        "NVML",
        "restart the container",
    ),
    "no devices": one(
        state_with_smi_output("No devices were found", 6), "gpu-missing", ERROR, "finds no GPU", "--gpus all"
    ),
    "no devices, and so on the CPU": one(
        state_with_smi_output("No devices were found", 6, backend=ON_CPU),
        "gpu-missing",
        ERROR,
        "finds no GPU",
        "--gpus all",
    ),
    "GPU lost": one(
        state_with_smi_output("Unable to determine the device handle for GPU 0000:02:00.0", 15),
        "gpu-lost",
        ERROR,
        "",
        "power",
    ),
    "one GPU of two lost": one(
        state_with_smi_output(row() + "\nGPU is lost", 15, gpus=(GPU,)),
        "gpu-lost",
        ERROR,
        "fallen off the bus",
        "power cable",
        spec(expect=ExpectSpec(gpus=2)),
    ),
    "infoROM": one(state_with_smi_output(row(), 14), "gpu-inforom", WARNING, "infoROM", "looked at"),
    "ERR! in the table": one(state_with_smi_output(row(fan_speed="ERR!")), "gpu-faulty", ERROR, "fan.speed", "Xid"),
    "too hot": one(
        state_with_smi_output(row(clocks_throttle_reasons_active="0x40")),
        "gpu-throttled",
        WARNING,
        "hw-thermal",
        "fans",
    ),
    "persistence off": one(
        state_with_smi_output(row(persistence_mode="Disabled")), "persistence-off", INFO, "seconds", "nvidia-smi -pm 1"
    ),
    "a greeting instead of a table": one(
        state_with_smi_output("Welcome!"), "gpu-unreadable", ERROR, "Welcome!", "wrapper"
    ),
    "nvidia-smi missing": one(
        state_with_smi_output("sh: nvidia-smi: not found", 127), "nvidia-smi-missing", WARNING, "usual path", "image"
    ),
    "nvidia-smi missing, and nobody wants a GPU": one(
        state_with_smi_output("sh: nvidia-smi: not found", 127),
        "nvidia-smi-missing",
        INFO,
        "usual path",
        "works without",
        spec(expect=ExpectSpec()),
    ),
    "nvidia-smi too old": one(
        state_with_smi_output(f'Field "{FIELDS[1]}" is not a valid field to query.', 2),
        "nvidia-smi-old",
        ERROR,
        "uuid",
        "update",
    ),
    "nvidia-smi hangs": one(
        state_with_findings(*HUNG.findings, gpus=None, backend=ON_CPU), "driver-hung", ERROR, "did not answer", "reboot"
    ),
    "a host without sessions": one(
        state_with_findings(
            Finding("gpu-unknown", INFO, None, "no session", "exposed TCP"), gpus=None, host=HostState()
        ),
        "gpu-unknown",
        INFO,
        "no session",
        "exposed TCP",
    ),
    # -- the GPU against what is expected
    "fewer GPUs": one(
        state(gpus=(FEWER,)),
        "gpu-count",
        ERROR,
        "1 GPU is there, expected were 2",
        "dmesg",
        spec(expect=ExpectSpec(gpus=2)),
    ),
    "more GPUs": one(state(gpus=(GPU, OTHER)), "gpu-count", INFO, "2 GPUs are there", "expect.gpus"),
    "no GPU at all": one(state(gpus=()), "gpu-missing", ERROR, "RTX 4090 was expected", "--gpus all"),
    "another GPU": one(
        state_with_smi_output(row(name="NVIDIA GeForce RTX 3090", memory_total="24576")),
        "gpu-differs",
        WARNING,
        "RTX 3090",
        "expect.gpu",
    ),
    "another GPU, and so other memory": one(
        state_with_smi_output(row(name="NVIDIA GeForce RTX 3080", memory_total="10240")),
        "gpu-differs",
        WARNING,
        "3080",
        "expect.gpu",
    ),
    "a slice of it": one(state(gpus=(MIG,)), "vram-differs", WARNING, "9856 MiB", "MIG"),
    "driver updated": one(
        state_with_smi_output(row(driver_version="560.35.03")),
        "driver-differs",
        INFO,
        "560.35.03, expected was 550",
        "expect.driver",
    ),
    # -- who it is
    "another host": one(state(host=HostState("box", "550.1")), "hostname-differs", WARNING, "box", "expect.hostname"),
    "the same way twice": Fault(
        (spec(), spec("copy")),
        (state(), state("copy")),
        "tunnel-duplicate",
        WARNING,
        "iceland and copy",
        "delete copy from mesh.yaml",
    ),
    "two ways to one GPU": two(state(), state(), "same-gpu", f"certain: nvidia-smi shows {GPU.uuid}", "keep local"),
    "two ways to one host, by its key": two(
        state(tunnel=replace(state().tunnel, host_keys=(KEY,))),
        without_gpus(
            state(
                tunnel=TunnelState("sshtunnel", TunnelPhase.UP, host_keys=("SHA256:other", KEY)),
                backend=backend(catalog=()),
            )
        ),
        "same-gpu",
        f"most likely one machine: the same SSH host key, {KEY}",
        "keep iceland",
        replace(spec("vpn", expect=ExpectSpec()), ssh=replace(spec().ssh, host="10.0.0.7")),  # type: ignore[type-var]
    ),
    "two ways to one store": two(
        state(), without_gpus(state()), "same-gpu", "most likely one machine: one model store", "keep iceland"
    ),
    "two ways to one store, without a GPU to ask for": two(
        state(),
        replace(without_gpus(state()), noticed=(Finding("gpu-unknown", INFO, None, "no ssh", "give it one"),)),
        "same-gpu",
        "most likely",
        "keep iceland",
    ),
    # -- the server
    "server down": one(
        probed(ProbeError("nothing listens", finding_code="backend-down", hint="start the server on the host")),
        "backend-down",
        ERROR,
        "nothing listens",
        "start the server",
    ),
    "server down, as an older mesh tells it": one(
        state(backend=BackendState("ollama", BackendPhase.DOWN)),
        "backend-down",
        ERROR,
        "does not answer",
        "backend.port",
    ),
    "a web page on the port": one(
        probed(ProbeError('a web page, "nginx"', finding_code="wrong-server", hint="point `backend.port` at it")),
        "wrong-server",
        ERROR,
        "nginx",
        "backend.port",
    ),
    "HTTP to a port that speaks HTTPS": one(
        probed(wrong_server.wrong_scheme_error("http://127.0.0.1:80")),
        "wrong-scheme",
        ERROR,
        "speaks HTTPS",
        "https://",
    ),
    "a certificate of nobody": one(
        probed(ProbeError("self-signed", finding_code="tls-refused", hint="a known authority")),
        "tls-refused",
        ERROR,
        "self-signed",
        "authority",
    ),
    "a login page before it": one(
        probed(ProbeError("HTTP 302, to /login", finding_code="redirected", hint="the server itself")),
        "redirected",
        ERROR,
        "302",
        "itself",
    ),
    "half a list of models": one(
        probed(unusable_answers.broken_answer_error("half")), "answer-broken", ERROR, "half", "log on its host"
    ),
    "100,000 models": one(
        probed(unusable_answers.too_many_models_error("more than 8 MiB")), "models-too-many", ERROR, "8 MiB", "remove"
    ),
    "redirected, as a mesh tells it that noticed no more": one(
        state(backend=BackendState("ollama", BackendPhase.DOWN, last_error="302", error_code="redirected")),
        "redirected",
        ERROR,
        "302",
        "the inference server itself",
    ),
    "Host refused": one(
        probed(ProbeError("403", finding_code="host-refused", hint="OLLAMA_HOST=0.0.0.0")),
        "host-refused",
        ERROR,
        "403",
        "OLLAMA",
    ),
    "wants a key": one(
        probed(ProbeError("401", finding_code="key-refused", hint="`backend.api_key_env`")),
        "key-refused",
        ERROR,
        "",
        "api_key",
    ),
    "nothing listens on a direct node's port": one(
        state_with_error(errors.ConnectRefused("nothing listens on 127.0.0.1:11434", hint="is it running?")),
        "backend-down",
        ERROR,
        "nothing listens",
        "running",
        replace(direct("iceland"), expect=ExpectSpec(gpus=1)),
    ),
    "half on the CPU": one(state(backend=SPILLED), "backend-on-cpu", WARNING, "llama3:70b (50 %)", "quantisation"),
    "version too old": one(state(backend=backend(version="0.5.1")), "version-old", WARNING, "0.5.1", "install.sh"),
    # -- models
    "model missing": one(
        state(backend=backend(models=("phi3",), catalog=())), "model-missing", WARNING, "qwen2.5:7b", "pull"
    ),
    "one name, two models": two(
        state(),
        a_stranger(state(backend=backend(catalog=(ModelInfo("qwen2.5:7b", "another"),)))),
        "model-differs",
        "qwen2.5:7b is not the same",
        "ollama pull",
    ),
    "disk full": one(
        state(host=HostState("af4a84245990", "550.1", store_free_mib=300)), "disk-full", WARNING, "0.3 GiB", "models rm"
    ),
    # -- the ways to the server
    "a candidate is dead": one(
        state_with_routes(
            route("http://a:1"),
            route("http://b:1", state=BackendPhase.DOWN, error="http://b:1: nobody", latency_ms=None),
        ),
        "route-dead",
        INFO,
        "http://b:1: nobody",
        "backend.urls",
    ),
    "candidates are different servers": one(
        state_with_routes(route("http://a:1"), route("http://b:1", store="store:2", latency_ms=1.0)),
        "routes-differ",
        WARNING,
        "http://b:1",
        "a node of each",
    ),
    "a later candidate is faster": one(
        state_with_routes(route("http://a:1"), route("http://b:1", latency_ms=4.0)),
        "route-slower",
        INFO,
        "40.0 ms",
        "http://b:1 first",
    ),
    "the tunnel is slower than the network": one(
        state_with_routes(
            route("http://a:1", via="sshtunnel"), route("http://10.0.0.7:80", latency_ms=1.0, offered=True)
        ),
        "route-slower",
        INFO,
        "1.0 ms",
        "no `ssh`",
    ),
    "open to the internet": one(
        state_with_routes(
            route("http://a:1"), route("http://203.0.113.7:80", latency_ms=39.0, offered=True, exposed=True)
        ),
        "backend-exposed",
        WARNING,
        "whole internet",
        "OLLAMA_HOST=127.0.0.1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_finding(name: str) -> None:
    fault = FAULTS[name]
    (finding,) = audit_findings(fault.specs, *fault.states)
    assert (finding.code, finding.severity) == (fault.code, fault.severity)
    assert finding.code in CATALOG
    assert fault.message in finding.message
    assert finding.hint, "there is something to do about everything"
    assert fault.hint in finding.hint
    names = {one.name for one in fault.specs}
    assert finding.node in names or (len(names) > 1 and set(finding.nodes) == names)
    assert set(finding.nodes) in (set(), names)


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 25
    assert len({fault.code for fault in FAULTS.values()}) >= 35


def test_what_is_as_expected_gives_none() -> None:
    assert audit_findings(spec(), state()) == ()
    assert audit_findings(spec(), state_with_smi_output()) == ()


def test_several_faults_are_several_findings_the_worst_first() -> None:
    ill = state_with_smi_output(
        row(name="NVIDIA GeForce RTX 3090", persistence_mode="Disabled", fan_speed="ERR!"),
        host=HostState("box", "550.54.15"),
        backend=backend(version="0.1.0", models=()),
    )
    assert [(one.severity, one.code) for one in audit_findings(spec(), ill)] == [
        (ERROR, "gpu-faulty"),
        (WARNING, "hostname-differs"),
        (WARNING, "gpu-differs"),
        (WARNING, "version-old"),
        (WARNING, "model-missing"),
        (INFO, "persistence-off"),
    ]


def test_nodes_that_are_off_or_not_there_are_passed_over() -> None:
    off = replace(spec(), enabled=False)
    assert audit_findings(off, state_with_error(errors.ConnectRefused("refused"))) == ()
    assert audit_findings((spec(), spec("new")), state()) == ()
    assert audit_findings(spec(), state(), state("a node of an older file")) == ()


def test_a_model_that_is_missing_everywhere_is_missing_on_each() -> None:
    lacks = backend(models=("x",), catalog=(replace(MODEL, name="x", modified_at=None),))
    ill = [replace(state(name), backend=lacks, gpus=(replace(GPU, uuid=f"GPU-0000000{name}"),)) for name in ("a", "b")]
    specs = [replace(spec(name), ssh=replace(spec().ssh, host=name)) for name in ("a", "b")]  # type: ignore[type-var]
    assert [(one.code, one.node) for one in audit_findings(specs, *ill)] == [
        ("model-missing", "a"),
        ("model-missing", "b"),
    ]
