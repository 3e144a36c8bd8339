"""Every failure of nvidia-smi that docs/internals/nvidia-smi.md describes, staged on a host with a real shell."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.probes.commands.combined_commands import EXTRA_SEARCH_PATH
from gpumesh.probes.nvidia_smi import MAX_GPUS_ASKED_SINGLY, GpuReport, probe_gpus
from gpumesh.state import Severity
from gpumesh.tunnels.base import ExecResult
from tests.probes.command_routes import run_directly, run_over_ssh
from tests.probes.shell_host import (
    BUSY,
    IDLE,
    MIG,
    OTHER_UUID,
    UUID,
    ShellHost,
    SmiAnswer,
    old_row,
    row,
)

PATIENCE_S = 20.0
APPS = "--query-compute-apps"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA"
    " driver is installed and running.\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\n"
LOST = "GPU is lost. Reboot the system to recover this GPU"
ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO


@dataclass(frozen=True)
class Fault:
    """What nvidia-smi says; the one finding that it must give, words of its message and of its hint; how many GPUs
    are known all the same (``None``: that cannot be known)."""

    text: str
    status: int
    code: str
    severity: Severity
    message: str
    hint: str
    gpus: int | None = None


FAULTS = {
    "bad field, even the oldest": Fault(
        'Field "uuid" is not a valid field to query.\n\n', 2, "nvidia-smi-old", ERROR, "uuid", "update"
    ),
    "no devices": Fault("No devices were found\n", 6, "gpu-missing", ERROR, "finds no GPU", "--gpus all", 0),
    "no devices, said by a wrapper": Fault("No devices were found\n", 0, "gpu-missing", ERROR, "no GPU", "lspci", 0),
    "no driver": Fault(NO_DRIVER, 9, "driver-broken", ERROR, "couldn't communicate", "modprobe nvidia"),
    "no driver, status lost in a wrapper": Fault(NO_DRIVER, 0, "driver-broken", ERROR, "communicate", "modprobe"),
    "no driver, other status": Fault(NO_DRIVER, 1, "driver-broken", ERROR, "communicate", "modprobe"),
    "status 9 without a word": Fault("", 9, "driver-broken", ERROR, "does not answer", "nvidia-smi"),
    "mismatch": Fault(MISMATCH, 18, "driver-mismatch", ERROR, "different versions", "reboot"),
    "mismatch, newer": Fault(
        MISMATCH + "NVML library version: 535.161\n", 18, "driver-mismatch", ERROR, "535.161", "reboot"
    ),
    "mismatch, status 255": Fault(MISMATCH, 255, "driver-mismatch", ERROR, "different versions", "reboot"),
    "container without its cgroup": Fault(
        "Failed to initialize NVML: Unknown Error\n", 255, "gpu-cgroup-lost", ERROR, "NVML", "restart the container"
    ),
    "container without its cgroup, status 1": Fault(
        "Failed to initialize NVML: Unknown Error", 1, "gpu-cgroup-lost", ERROR, "NVML", "restart the container"
    ),
    "NVML without a driver": Fault(
        "Failed to initialize NVML: Driver Not Loaded\n", 9, "driver-broken", ERROR, "Driver Not Loaded", "modprobe"
    ),
    "lost": Fault(
        f"Unable to determine the device handle for GPU 0000:02:00.0: {LOST}\n",
        15,
        "gpu-lost",
        ERROR,
        "0000:02:00.0",
        "power cable",
    ),
    "lost, with a full stop and two blanks": Fault(
        "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot the system to recover this"
        " GPU.\n",
        15,
        "gpu-lost",
        ERROR,
        "fallen off the bus",
        "reboot",
    ),
    "lost, unknown error": Fault(
        "Unable to determine the device handle for GPU0000:01:00.0: Unknown Error\n",
        255,
        "gpu-lost",
        ERROR,
        "0000:01:00.0",
        "reboot",
    ),
    "lost, with its index": Fault(
        f"Unable to determine the device handle for GPU0: 0000:09:00.0: {LOST}",
        15,
        "gpu-lost",
        ERROR,
        "0000:09:00.0",
        "reboot",
    ),
    "lost, wrapped over lines": Fault(
        "Unable to determine the\ndevice handle for GPU 0000:02:00.0: GPU is\nlost. Reboot the system to recover this"
        " GPU\n",
        15,
        "gpu-lost",
        ERROR,
        "0000:02:00.0: GPU is lost",
        "reboot",
    ),
    "lost, status lost in a wrapper": Fault(
        f"Unable to determine the device handle for GPU 0000:02:00.0: {LOST}\n",
        0,
        "gpu-lost",
        ERROR,
        "0000:02:00.0",
        "reboot",
    ),
    "lost, status alone": Fault("", 15, "gpu-lost", ERROR, "fallen off the bus", "reboot"),
    "infoROM": Fault(
        f"{row()}\nWARNING: infoROM is corrupted at gpu 0000:01:00.0\n",
        14,
        "gpu-inforom",
        WARNING,
        "infoROM",
        "looked at",
        1,
    ),
    "not installed": Fault("sh: 1: nvidia-smi: not found\n", 127, "nvidia-smi-missing", WARNING, "usual path", "image"),
    "not executable": Fault(
        "sh: 1: nvidia-smi: Permission denied\n", 126, "nvidia-smi-missing", WARNING, "not installed", "utilities"
    ),
    "other failure": Fault(
        "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.\n",
        12,
        "driver-broken",
        ERROR,
        "status 12: NVIDIA-SMI couldn't find libnvidia-ml.so",
        "nvidia-smi",
    ),
    "a library is missing": Fault(
        "nvidia-smi: error while loading shared libraries: libnvidia-ml.so.1: cannot open shared object file: No such"
        " file or directory\n",
        127,
        "driver-broken",
        ERROR,
        "nvidia-smi is there, but cannot start: nvidia-smi: error while loading shared libraries: libnvidia-ml.so.1",
        "--gpus all",
    ),
    "of another machine": Fault(
        "sh: 1: nvidia-smi: Exec format error\n", 126, "driver-broken", ERROR, "Exec format error", "libraries"
    ),
    "its loader is missing": Fault(
        "bash: /usr/bin/nvidia-smi: cannot execute: required file not found\n",
        127,
        "driver-broken",
        ERROR,
        "required file not found",
        "libraries",
    ),
    "another file is missing": Fault(
        "Error opening /dev/nvidiactl: No such file or directory\n",
        1,
        "driver-broken",
        ERROR,
        "nvidiactl",
        "nvidia-smi",
    ),
    "not installed, by fish": Fault(
        "fish: Unknown command: nvidia-smi\n", 127, "nvidia-smi-missing", WARNING, "usual path", "image"
    ),
    "not installed, by csh": Fault(
        "nvidia-smi: Command not found.\n", 1, "nvidia-smi-missing", WARNING, "usual path", "image"
    ),
    "a failure without a word": Fault("", 3, "driver-broken", ERROR, "ended with status 3", "nvidia-smi"),
    "a wrapper's greeting instead of a table": Fault(
        "Welcome to the machine!\n", 0, "gpu-unreadable", ERROR, "Welcome to the machine", "wrapper"
    ),
    "nothing at all": Fault("", 0, "gpu-unreadable", ERROR, "nothing", "nvidia-smi"),
    "a GPU that reads errors": Fault(
        row(fan_speed="ERR!", power_draw="[Unknown Error]") + "\n",
        0,
        "gpu-faulty",
        ERROR,
        "GPU 0: nvidia-smi reads an error for fan.speed, power.draw",
        "Xid",
        1,
    ),
    "thermal slowdown": Fault(
        row(clocks_throttle_reasons_active="0x0000000000000048") + "\n",
        0,
        "gpu-throttled",
        WARNING,
        "hw-slowdown, hw-thermal",
        "fans",
        1,
    ),
    "power brake": Fault(
        row(clocks_throttle_reasons_active="0x0000000000000088"),
        0,
        "gpu-throttled",
        WARNING,
        "power-brake",
        "power supply",
        1,
    ),
    "persistence off": Fault(IDLE + "\n", 0, "persistence-off", INFO, "takes seconds", "nvidia-smi -pm 1", 1),
}


async def probe(host: ShellHost, timeout_s: float = PATIENCE_S) -> GpuReport:
    return await probe_gpus(run_directly(host.exec), timeout_s=timeout_s, node="iceland")


@pytest.mark.parametrize("name", FAULTS)
async def test_each_fault_gives_its_own_finding(host: ShellHost, name: str) -> None:
    fault = FAULTS[name]
    host.nvidia_smi(SmiAnswer("", when=APPS), SmiAnswer(fault.text, fault.status))
    report = await probe(host)
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.node) == (fault.code, fault.severity, "iceland")
    assert fault.message in finding.message
    assert finding.hint is not None
    assert fault.hint in finding.hint
    assert len(report.gpus) == (fault.gpus or 0)
    assert (report.error is None) == (fault.gpus is not None)
    assert report.hostname == "af4a84245990", "whatever happens to the GPU, who answers is known"


def test_faults_of_all_kinds_are_staged() -> None:
    assert len(FAULTS) >= 25


async def test_a_good_card_gives_no_finding(host: ShellHost) -> None:
    host.nvidia_smi(SmiAnswer(f"{UUID}, 4711, /usr/bin/ollama runner, 5120\n", when=APPS), SmiAnswer(row() + "\n"))
    report = await probe(host)
    (gpu,) = report.gpus
    assert report == GpuReport(report.gpus, driver="550.54.15", hostname="af4a84245990")
    assert (gpu.name, gpu.uuid, gpu.memory_total_mib, gpu.memory_free_mib) == (
        "NVIDIA GeForce RTX 4090",
        UUID,
        24564,
        18560,
    )
    (process,) = gpu.processes
    assert (process.pid, process.name, process.used_memory_mib) == (4711, "/usr/bin/ollama runner", 5120)
    assert len(host.calls) == 1, "all in one round trip"


async def test_a_busy_card_and_the_parent_of_mig_slices(host: ShellHost) -> None:
    host.nvidia_smi(SmiAnswer("", when=APPS), SmiAnswer(f"{BUSY}\n{MIG.replace('0, GPU', '1, GPU', 1)}\n"))
    report = await probe(host)
    busy, mig = report.gpus
    assert (busy.utilization_pct, busy.power_w, busy.pstate, busy.throttle) == (7, 84.24, "P2", "none")
    assert (mig.utilization_pct, mig.memory_utilization_pct, mig.fan_pct) == (None, None, None), "[N/A] is unknown"
    assert (mig.memory_total_mib, mig.temperature_c, mig.persistence) == (81559, 53, True)
    assert busy.processes == (), "that the list is empty says nothing"


async def test_a_driver_that_lacks_a_field_is_asked_for_the_old_fields(host: ShellHost) -> None:
    host.nvidia_smi(
        SmiAnswer("", when=APPS),
        SmiAnswer('Field "fan.speed" is not a valid field to query.\n\n', 2, when="fan.speed"),
        SmiAnswer(old_row() + "\n"),
    )
    report = await probe(host)
    (gpu,) = report.gpus
    assert (report.error, report.findings) == (None, ())
    assert (gpu.memory_used_mib, gpu.temperature_c, gpu.fan_pct, gpu.persistence) == (5632, 61, None, None)


async def test_one_lost_gpu_does_not_hide_the_others(host: ShellHost) -> None:
    lost = f"Unable to determine the device handle for GPU 0000:02:00.0: {LOST}\n"
    host.nvidia_smi(
        SmiAnswer(f"{OTHER_UUID}, 77, python3, 100\n", when=APPS),
        SmiAnswer(row() + "\n", when="-i 0 "),
        SmiAnswer(lost, 15, when="-i 1 "),
        SmiAnswer(row(index="2", uuid=OTHER_UUID, pci_bus_id="00000000:03:00.0") + "\n", when="-i 2 "),
        SmiAnswer("No devices were found\n", 6, when="-i "),
        SmiAnswer(lost, 15),
    )
    report = await probe(host)
    assert [gpu.uuid for gpu in report.gpus] == [UUID, OTHER_UUID]
    assert report.gpus[1].processes[0].name == "python3"
    assert report.error is None
    assert [finding.code for finding in report.findings] == ["gpu-lost"]
    assert len(host.calls) == 2
    assert host.calls[1][2].count(" -i ") == MAX_GPUS_ASKED_SINGLY


async def test_nvidia_smi_outside_the_path_is_found(host: ShellHost) -> None:
    if shutil.which("nvidia-smi", path=EXTRA_SEARCH_PATH):
        pytest.skip("there is a real one on this machine")
    report = await probe(host)
    assert [finding.code for finding in report.findings] == ["nvidia-smi-missing"]
    assert report.hostname == "af4a84245990"


async def test_a_hung_driver_and_a_slow_one_differ(host: ShellHost) -> None:
    host.command("nvidia-smi", "exec sleep 600")
    report = await probe(host, 0.3)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("driver-hung", ERROR)
    assert "0.3 s" in finding.message
    assert "dmesg" in (finding.hint or "")
    assert "nvidia-smi -pm 1" in (finding.hint or "")
    assert report.error is not None


async def test_a_host_without_sessions_says_that_gpus_are_unknown() -> None:
    async def refuse(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        raise ExecError("ssh.runpod.io runs no commands", hint="use SSH over exposed TCP")

    report = await probe_gpus(run_directly(refuse), timeout_s=PATIENCE_S, node="pod")
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.hint) == ("gpu-unknown", INFO, "use SSH over exposed TCP")
    assert report.error == "ssh.runpod.io runs no commands"


async def test_a_tunnel_that_is_down_gives_no_second_finding() -> None:
    async def down(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        raise TunnelDown("the tunnel is backoff")

    report = await probe_gpus(run_directly(down), timeout_s=PATIENCE_S, node="pod")
    assert (report.findings, report.error) == ((), "the tunnel is backoff")


async def test_names_from_a_host_are_made_printable(host: ShellHost) -> None:
    host.command("hostname", r"printf '\033]0;owned\007box\n'")
    hostile = row(name="\x1b[2J\x1b[31mNVIDIA\x1b]0;owned\x07 GeForce RTX 4090\x9b5m\u202e")
    host.nvidia_smi(SmiAnswer(f"{UUID}, 1, \x1b[31mrm -rf\x1b[0m, 5\n", when=APPS), SmiAnswer(hostile))
    report = await probe(host)
    (gpu,) = report.gpus
    assert gpu.name == "NVIDIA GeForce RTX 4090"
    assert gpu.processes[0].name == "rm -rf"
    assert report.hostname == "box"


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("two words", None),
        ("", None),
        ("a" * 300, None),
        ("box.example.org", "box.example.org"),
        ("Welcome to the pod!\n\nbox", "box"),
    ],
)
async def test_a_hostname_is_a_name_or_unknown(host: ShellHost, output: str, name: str | None) -> None:
    host.command("hostname", f"echo '{output}'")
    host.nvidia_smi(SmiAnswer(row()))
    assert (await probe(host)).hostname == name


async def test_several_faults_of_several_gpus_are_one_finding_of_a_kind(host: ShellHost) -> None:
    off = {"persistence_mode": "Disabled"}
    rows = (
        row(**off),
        row(**off, index="1", uuid=OTHER_UUID, clocks_throttle_reasons_active="0x20", fan_speed="ERR!"),
    )
    host.nvidia_smi(SmiAnswer("", when=APPS), SmiAnswer("\n".join(rows)))
    report = await probe(host)
    assert [finding.code for finding in report.findings] == ["gpu-faulty", "gpu-throttled", "persistence-off"]
    assert report.findings[2].message.startswith("GPUs 0, 1: ")
    assert report.findings[1].message.startswith("GPU 1: ")


async def test_a_slow_host_takes_no_longer_than_the_timeout(host: ShellHost) -> None:
    host.command("nvidia-smi", "exec sleep 600")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await probe(host, 0.2)
    assert loop.time() - began < 10.0


@pytest.mark.parametrize("status", [1, 127])
async def test_a_shell_that_runs_no_command_is_not_a_missing_nvidia_smi(status: int) -> None:
    async def run(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        del argv, timeout_s
        return ExecResult(status, b"", b"This account is currently not available.\n")

    commands = run_over_ssh(run, b"This account is currently not available.\n", status)
    report = await probe_gpus(commands, timeout_s=PATIENCE_S, node="a")
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.node) == ("gpu-unknown", Severity.INFO, "a")
    assert "runs no commands: to each it says 'This account" in finding.message
    assert "login shell" in (finding.hint or "")
    assert report.error == finding.message
