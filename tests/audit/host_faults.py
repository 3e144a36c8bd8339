"""Staged faults of hosts: reaching them, who they are, their GPUs."""

from __future__ import annotations

from dataclasses import replace

from gpumesh import errors
from gpumesh.probes.smi_tables import FIELDS
from gpumesh.state import (
    Finding,
    HostState,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import ExpectSpec
from tests.audit.build import (
    GPU,
    KEY,
    OTHER,
    backend,
    spec,
    state,
    state_with_error,
    state_with_findings,
    state_with_smi_output,
    without_gpus,
)
from tests.audit.staged_faults import (
    ERROR,
    GPU_WITHOUT_FIGURES,
    HUNG,
    INFO,
    MIG,
    NO_DRIVER,
    OLD_KEY,
    ON_CPU,
    WARNING,
    Fault,
    node_fault,
    pair_fault,
)
from tests.probes.shell_host import row

HOST_FAULTS: dict[str, Fault] = {
    # -- reaching the host
    "host off": node_fault(
        state_with_error(errors.ConnectTimeout("no answer within 8 s")), "node-unreachable", ERROR, "8 s", "firewall"
    ),
    "port changed": node_fault(
        state_with_error(errors.ConnectRefused("refused")), "node-unreachable", ERROR, "refused", "`ssh.port`"
    ),
    "name unknown": node_fault(
        state_with_error(errors.HostUnresolved("unknown")), "node-unreachable", ERROR, "unknown", "`ssh.host`"
    ),
    "network down": node_fault(
        state_with_error(errors.HostUnreachable("no route")), "node-unreachable", ERROR, "route", "network"
    ),
    "a web server on the SSH port": node_fault(
        state_with_error(errors.NotSsh("HTTP")), "node-unreachable", ERROR, "HTTP", "`ssh.port`"
    ),
    "connection lost": node_fault(
        state_with_error(errors.TunnelLost("reset")), "node-unreachable", ERROR, "reset", "ssh -p 13323"
    ),
    "key refused": node_fault(
        state_with_error(errors.AuthRefused("refused", hint="put it into authorized_keys")),
        "auth-refused",
        ERROR,
        "",
        "authorized",
    ),
    "host key changed": node_fault(
        state_with_error(OLD_KEY), "host-key-changed", ERROR, "host key", "gpumesh trust iceland"
    ),
    "host key unknown": node_fault(
        state_with_error(errors.HostKeyUnknown("not known", hint="`gpumesh trust`")),
        "host-key-unknown",
        ERROR,
        "",
        "trust",
    ),
    "host key revoked": node_fault(
        state_with_error(errors.HostKeyRevoked("revoked", hint="whoever marked it")),
        "host-key-revoked",
        ERROR,
        "",
        "marked",
    ),
    "key file missing": node_fault(
        state_with_error(errors.KeyUnreadable("no such file", hint="`ssh.identity_file`")),
        "key-unreadable",
        ERROR,
        "",
        "identity",
    ),
    "password not set": node_fault(
        state_with_error(errors.SecretMissing("$PW is not set", hint="export PW")),
        "secret-missing",
        ERROR,
        "$PW",
        "export",
    ),
    "forwarding forbidden": node_fault(
        state_with_error(errors.ForwardingForbidden("no", hint="AllowTcpForwarding")),
        "forwarding-forbidden",
        ERROR,
        "",
        "Allow",
    ),
    "a proxy of terminals": node_fault(
        state_with_error(errors.TransportUnsupported("no", hint="exposed TCP")),
        "transport-unsupported",
        ERROR,
        "",
        "exposed TCP",
    ),
    # -- the GPU, as nvidia-smi tells it
    "no driver": node_fault(
        state_with_smi_output(NO_DRIVER, 9), "driver-broken", ERROR, "communicate", "modprobe nvidia"
    ),
    "no driver, and so on the CPU": node_fault(
        state_with_smi_output(NO_DRIVER, 9, backend=ON_CPU), "driver-broken", ERROR, "communicate", "modprobe nvidia"
    ),
    "driver updated under it": node_fault(
        state_with_smi_output("Failed to initialize NVML: Driver/library version mismatch", 18),
        "driver-mismatch",
        ERROR,
        "",
        "reboot",
    ),
    "container without its cgroup": node_fault(
        state_with_smi_output("Failed to initialize NVML: Unknown Error", 255),
        "gpu-cgroup-lost",
        ERROR,
        "NVML",
        "restart the container",
    ),
    "no devices": node_fault(
        state_with_smi_output("No devices were found", 6), "gpu-missing", ERROR, "finds no GPU", "--gpus all"
    ),
    "no devices, and so on the CPU": node_fault(
        state_with_smi_output("No devices were found", 6, backend=ON_CPU),
        "gpu-missing",
        ERROR,
        "finds no GPU",
        "--gpus all",
    ),
    "GPU lost": node_fault(
        state_with_smi_output("Unable to determine the device handle for GPU 0000:02:00.0", 15),
        "gpu-lost",
        ERROR,
        "",
        "power",
    ),
    "one GPU of two lost": node_fault(
        state_with_smi_output(row() + "\nGPU is lost", 15, gpus=(GPU,)),
        "gpu-lost",
        ERROR,
        "fallen off the bus",
        "power cable",
        spec(expect=ExpectSpec(gpus=2)),
    ),
    "infoROM": node_fault(state_with_smi_output(row(), 14), "gpu-inforom", WARNING, "infoROM", "looked at"),
    "ERR! in the table": node_fault(
        state_with_smi_output(row(fan_speed="ERR!")), "gpu-faulty", ERROR, "fan.speed", "Xid"
    ),
    "too hot": node_fault(
        state_with_smi_output(row(clocks_throttle_reasons_active="0x40")),
        "gpu-throttled",
        WARNING,
        "hw-thermal",
        "fans",
    ),
    "persistence off": node_fault(
        state_with_smi_output(row(persistence_mode="Disabled")), "persistence-off", INFO, "seconds", "nvidia-smi -pm 1"
    ),
    "a greeting instead of a table": node_fault(
        state_with_smi_output("Welcome!"), "gpu-unreadable", ERROR, "Welcome!", "wrapper"
    ),
    "nvidia-smi missing": node_fault(
        state_with_smi_output("sh: nvidia-smi: not found", 127), "nvidia-smi-missing", WARNING, "usual path", "image"
    ),
    "nvidia-smi missing, and nobody wants a GPU": node_fault(
        state_with_smi_output("sh: nvidia-smi: not found", 127),
        "nvidia-smi-missing",
        INFO,
        "usual path",
        "works without",
        spec(expect=ExpectSpec()),
    ),
    "nvidia-smi too old": node_fault(
        state_with_smi_output(f'Field "{FIELDS[1]}" is not a valid field to query.', 2),
        "nvidia-smi-old",
        ERROR,
        "uuid",
        "update",
    ),
    "nvidia-smi hangs": node_fault(
        state_with_findings(*HUNG.findings, gpus=None, backend=ON_CPU), "driver-hung", ERROR, "did not answer", "reboot"
    ),
    "a host without sessions": node_fault(
        state_with_findings(
            Finding("gpu-unknown", INFO, None, "no session", "exposed TCP"), gpus=None, host=HostState()
        ),
        "gpu-unknown",
        INFO,
        "no session",
        "exposed TCP",
    ),
    # -- the GPU against what is expected
    "fewer GPUs": node_fault(
        state(gpus=(GPU_WITHOUT_FIGURES,)),
        "gpu-count",
        ERROR,
        "1 GPU is there, expected were 2",
        "dmesg",
        spec(expect=ExpectSpec(gpus=2)),
    ),
    "more GPUs": node_fault(state(gpus=(GPU, OTHER)), "gpu-count", INFO, "2 GPUs are there", "expect.gpus"),
    "no GPU at all": node_fault(state(gpus=()), "gpu-missing", ERROR, "RTX 4090 was expected", "--gpus all"),
    "another GPU": node_fault(
        state_with_smi_output(row(name="NVIDIA GeForce RTX 3090", memory_total="24576")),
        "gpu-differs",
        WARNING,
        "RTX 3090",
        "expect.gpu",
    ),
    "another GPU, and so other memory": node_fault(
        state_with_smi_output(row(name="NVIDIA GeForce RTX 3080", memory_total="10240")),
        "gpu-differs",
        WARNING,
        "3080",
        "expect.gpu",
    ),
    "a slice of it": node_fault(state(gpus=(MIG,)), "vram-differs", WARNING, "9856 MiB", "MIG"),
    "driver updated": node_fault(
        state_with_smi_output(row(driver_version="560.35.03")),
        "driver-differs",
        INFO,
        "560.35.03, expected was 550",
        "expect.driver",
    ),
    # -- who it is
    "another host": node_fault(
        state(host=HostState("box", "550.1")), "hostname-differs", WARNING, "box", "expect.hostname"
    ),
    "the same way twice": Fault(
        (spec(), spec("copy")),
        (state(), state("copy")),
        "tunnel-duplicate",
        WARNING,
        "iceland and copy",
        "delete copy from mesh.yaml",
    ),
    "two ways to one GPU": pair_fault(
        state(), state(), "same-gpu", f"certain: nvidia-smi shows {GPU.uuid}", "keep local"
    ),
    "two ways to one host, by its key": pair_fault(
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
    "two ways to one store": pair_fault(
        state(), without_gpus(state()), "same-gpu", "most likely one machine: one model store", "keep iceland"
    ),
    "two ways to one store, without a GPU to ask for": pair_fault(
        state(),
        replace(without_gpus(state()), noticed=(Finding("gpu-unknown", INFO, None, "no ssh", "give it one"),)),
        "same-gpu",
        "most likely",
        "keep iceland",
    ),
}
