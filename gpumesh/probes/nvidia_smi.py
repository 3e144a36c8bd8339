"""Probes a host's GPUs: runs nvidia-smi and ``hostname`` over the tunnel's connection, and builds the report."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.printable import printable
from gpumesh.probes.combined_commands import Argv, CommandOutput, RunCommand, run_commands
from gpumesh.probes.gpu_problems import find_gpu_problems
from gpumesh.probes.smi_failures import INFOROM, SmiFailure, classify_failure
from gpumesh.probes.smi_tables import FIELDS, OLD_FIELDS, PROCESS_FIELDS, GpuTable, read_gpus, read_processes
from gpumesh.state import Finding, GpuState, Severity

log = logging.getLogger(__name__)

FORMAT = "--format=csv,noheader,nounits"
HOSTNAME: Argv = ("hostname",)
PROCESSES: Argv = ("nvidia-smi", f"--query-compute-apps={','.join(PROCESS_FIELDS)}", FORMAT)
# If one GPU is lost, the call for all GPUs fails. Then each GPU is asked by itself, up to this number.
MAX_GPUS_ASKED_SINGLY = 16
_HOSTNAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True, slots=True)
class GpuReport:
    """The result of one probe. ``error`` is set if the GPUs are not known: then ``gpus`` is empty, but the host may
    have GPUs. There is at most one finding of each code."""

    gpus: tuple[GpuState, ...] = ()
    driver: str | None = None
    hostname: str | None = None
    error: str | None = None
    findings: tuple[Finding, ...] = ()


async def probe_gpus(run_command: RunCommand, *, timeout_s: float, node: str | None = None) -> GpuReport:
    """Asks a host for its GPUs, its driver and its hostname. Never raises because of what the host does.

    ``timeout_s`` is for the whole probe; after it the finding is ``driver-hung``. The prober sets it to 5 s
    (``GPU_TIMEOUT_S`` in mesh/nodes/prober.py), because a first call without persistence mode takes 1 to 3 s. ``node``
    is the name in the findings."""
    try:
        return await _probe_gpus(run_command, timeout_s=timeout_s, node=node)
    except Exception as error:
        # A bug of ours: the code that reads answers did not expect this answer. The bug must not end the mesh, so only
        # the report on these GPUs is lost.
        log.exception("what a host says of its GPUs could not be read", extra={"event": "probe-failed"})
        message = f"what nvidia-smi says cannot be read ({type(error).__name__})"
        hint = "the mesh's log has the details (`gpumesh logs`)"
        return GpuReport(error=message, findings=(Finding("gpu-unreadable", Severity.ERROR, node, message, hint),))


async def _probe_gpus(run_command: RunCommand, *, timeout_s: float, node: str | None) -> GpuReport:
    """Asks the host as ``probe_gpus`` does, but passes on the errors of our own bugs. Asks again with fewer fields if
    the driver is old, and for each GPU by itself if one GPU is lost."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    fields: Sequence[str] = FIELDS
    commands = (HOSTNAME, build_query_command(fields), PROCESSES)
    try:
        hostname_answer, gpus, processes = await run_commands(run_command, commands, timeout_s=timeout_s)
        # If the login shell refuses all commands, each of them fails with the shell's own text, for example "This
        # account is not available."
        has_failed = hostname_answer.exit_status != 0
        has_same_text = hostname_answer.output == gpus.output and hostname_answer.output.strip() != b""
        if has_failed and has_same_text:
            return _no_commands_report(hostname_answer, node)
        hostname = read_hostname(hostname_answer)
        failure = classify_failure(gpus)
        if failure is not None and failure.code == "nvidia-smi-old":
            fields = OLD_FIELDS
            (gpus,) = await run_commands(run_command, (build_query_command(fields),), timeout_s=deadline - loop.time())
            failure = classify_failure(gpus)
        if failure is not None and failure.code == "gpu-lost":
            time_left_s = deadline - loop.time()
            return await _probe_gpus_singly(
                run_command, failure, fields, processes, hostname=hostname, node=node, timeout_s=time_left_s
            )
    except TimeoutError:
        return _hung_report(timeout_s, node)
    except TunnelDown as error:
        return GpuReport(error=error.message)  # the tunnel has its own finding
    except ExecError as error:
        return GpuReport(
            error=error.message,
            findings=(Finding("gpu-unknown", Severity.INFO, node, error.message, error.hint),),
        )
    return build_gpu_report(gpus, processes, hostname=hostname, fields=fields, node=node)


def build_query_command(fields: Sequence[str], *, gpu: int | None = None) -> Argv:
    """The command that prints these fields of all GPUs, or only of the one with the index ``gpu``."""
    command: Argv = ("nvidia-smi", f"--query-gpu={','.join(fields)}", FORMAT)
    return command if gpu is None else (*command, "-i", str(gpu))


def build_gpu_report(
    gpus: CommandOutput,
    processes: CommandOutput,
    *,
    hostname: str | None = None,
    fields: Sequence[str] = FIELDS,
    node: str | None = None,
) -> GpuReport:
    """Builds the report from the answers to ``build_query_command(fields)`` and to ``PROCESSES``. Pure."""
    failure = classify_failure(gpus)
    if failure is not None:
        error = None if failure.code == "gpu-missing" else failure.message  # "no GPU" means that the GPUs are known
        return GpuReport(hostname=hostname, error=error, findings=(_failure_finding(failure, node),))
    table = read_gpus(gpus.output, fields, hostname=hostname)
    if not table.gpus:
        shown_output = f"{table.unread_line!r}" if table.unread_line else "nothing"
        message = f"nvidia-smi said {shown_output} instead of a table"
        hint = "run `nvidia-smi` on the host; is it a wrapper script?"
        finding = Finding("gpu-unreadable", Severity.ERROR, node, message, hint)
        return GpuReport(hostname=hostname, error=message, findings=(finding,))
    findings = find_gpu_problems(table, node)
    if gpus.exit_status == INFOROM:
        findings.append(
            Finding(
                "gpu-inforom",
                Severity.WARNING,
                node,
                "a GPU's infoROM is corrupted; its figures are good",
                "it works; have the card looked at when it can be spared",
            )
        )
    return GpuReport(_add_processes(table, processes), table.driver, hostname, findings=tuple(findings))


def read_hostname(answer: CommandOutput) -> str | None:
    """The name that ``hostname`` printed; ``None`` for a failure or for text that is no name."""
    if answer.exit_status != 0:
        return None
    lines = answer.output.strip().splitlines() or [b""]
    name = printable(lines[-1], 253)  # the last line, because a login shell may print a greeting before it
    return name if _HOSTNAME.fullmatch(name) else None


async def _probe_gpus_singly(
    run_command: RunCommand,
    lost_failure: SmiFailure,
    fields: Sequence[str],
    processes: CommandOutput,
    *,
    hostname: str | None,
    node: str | None,
    timeout_s: float,
) -> GpuReport:
    """Asks for each GPU by itself, because the call for all GPUs fails if one GPU is lost. The report has the GPUs that
    answer, and ``lost_failure`` as a finding. If no answer comes in time, the report has this finding only."""
    lost_finding = _failure_finding(lost_failure, node)
    no_gpus_report = GpuReport(hostname=hostname, error=lost_failure.message, findings=(lost_finding,))
    try:
        commands = [build_query_command(fields, gpu=index) for index in range(MAX_GPUS_ASKED_SINGLY)]
        outputs = await run_commands(run_command, commands, timeout_s=timeout_s)
    except (TimeoutError, ExecError, TunnelDown):  # the GPUs stay unknown, but ``lost_failure`` is known
        return no_gpus_report
    rows = [output.output for output in outputs if classify_failure(output) is None]
    table = read_gpus(b"\n".join(rows), fields, hostname=hostname)
    if not table.gpus:
        return no_gpus_report
    findings = (lost_finding, *find_gpu_problems(table, node))
    return GpuReport(_add_processes(table, processes), table.driver, hostname, findings=findings)


def _add_processes(table: GpuTable, processes: CommandOutput) -> tuple[GpuState, ...]:
    """The GPUs of the table, each with its processes from the answer to ``PROCESSES``."""
    by_uuid = read_processes(processes.output) if processes.exit_status == 0 else {}
    return tuple(replace(gpu, processes=by_uuid.get(gpu.uuid, ())) for gpu in table.gpus)


def _no_commands_report(answer: CommandOutput, node: str | None) -> GpuReport:
    """The report on a host that gave the same answer to every command: this is the login shell's answer, not
    nvidia-smi's."""
    message = f"the host runs no commands: to each it says {printable(answer.output, 200)!r}"
    hint = "check the account's login shell there, or a forced command in its authorized_keys; the server works without"
    return GpuReport(error=message, findings=(Finding("gpu-unknown", Severity.INFO, node, message, hint),))


def _failure_finding(failure: SmiFailure, node: str | None) -> Finding:
    return Finding(failure.code, failure.severity, node, failure.message, failure.hint)


def _hung_report(timeout_s: float, node: str | None) -> GpuReport:
    """The report on a host whose nvidia-smi did not answer in time."""
    message = f"nvidia-smi did not answer within {timeout_s:g} s"
    hint = "a hung driver needs a reboot: see `dmesg | grep -i nvrm`; a slow first call is cured by `nvidia-smi -pm 1`"
    return GpuReport(error=message, findings=(Finding("driver-hung", Severity.ERROR, node, message, hint),))
