"""Probes a host's GPUs: runs nvidia-smi and ``hostname`` over the tunnel's connection, and builds the report."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.probes.commands.combined_commands import Argv, CommandOutput, CommandRunner
from gpumesh.probes.commands.host_commands import CommandsUnfinished, CommandsUnproven
from gpumesh.probes.gpu_problems import find_gpu_problems
from gpumesh.probes.smi_failures import INFOROM, SmiFailure, classify_failure
from gpumesh.probes.smi_tables import FIELDS, OLD_FIELDS, PROCESS_FIELDS, GpuTable, read_gpus, read_processes
from gpumesh.probes.unanswered import describe_no_commands, describe_unfinished
from gpumesh.state import Finding, GpuState, Severity
from gpumesh.text.printable import printable

log = logging.getLogger(__name__)

FORMAT = "--format=csv,noheader,nounits"
HOSTNAME: Argv = ("hostname",)
PROCESSES: Argv = ("nvidia-smi", f"--query-compute-apps={','.join(PROCESS_FIELDS)}", FORMAT)
# If one GPU is lost, the call for all GPUs fails. Then each GPU is asked by itself, up to this number.
MAX_GPUS_ASKED_SINGLY = 16
_HOSTNAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


class Answer(StrEnum):
    """How far a probe came."""

    COMPLETE = "complete"  # the commands have ended, with whatever result
    UNFINISHED = "unfinished"  # the host still waits for something, and the next probe goes on with the same wait
    ABANDONED = "abandoned"  # the commands were ended after the time-out
    NO_SESSION = "no-session"  # the host gave no session, or the session broke
    NO_COMMANDS = "no-commands"  # the account runs no commands: it is for forwarding only


@dataclass(frozen=True, slots=True)
class GpuReport:
    """The result of one probe. ``error`` is set if the GPUs are not known: then ``gpus`` is empty, but the host may
    have GPUs. There is at most one finding of each code. ``took_s``: how long the commands ran on the host; ``None`` if
    that was not measured."""

    gpus: tuple[GpuState, ...] = ()
    driver: str | None = None
    hostname: str | None = None
    error: str | None = None
    findings: tuple[Finding, ...] = ()
    answer: Answer = Answer.COMPLETE
    took_s: float | None = field(default=None, compare=False)


async def probe_gpus(commands: CommandRunner, *, timeout_s: float, node: str | None = None) -> GpuReport:
    """Asks a host for its GPUs, its driver and its hostname. Never raises because of what the host does.

    ``timeout_s`` is for the whole probe. After it the finding says what the host waits for: ``login-shell-slow``,
    ``driver-hung`` or ``gpu-unknown``. ``node`` is the name in the findings."""
    try:
        return await _probe_gpus(commands, timeout_s=timeout_s, node=node)
    except Exception as error:
        # A bug of ours: the code that reads answers did not expect this answer. The bug must not end the mesh, so only
        # the report on these GPUs is lost.
        log.exception("what a host says of its GPUs could not be read", extra={"event": "probe-failed"})
        message = f"what nvidia-smi says cannot be read ({type(error).__name__})"
        hint = "the mesh's log has the details (`gpumesh logs`)"
        return GpuReport(error=message, findings=(Finding("gpu-unreadable", Severity.ERROR, node, message, hint),))


async def _probe_gpus(commands: CommandRunner, *, timeout_s: float, node: str | None) -> GpuReport:
    """Asks the host as ``probe_gpus`` does, but passes on the errors of our own bugs."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    try:
        argvs = (HOSTNAME, build_query_command(FIELDS), PROCESSES)
        hostname_answer, gpus, processes = await commands.run(argvs, timeout_s=timeout_s)
    except CommandsUnproven as unproven:
        return _build_unproven_report(unproven, node)
    except CommandsUnfinished as unfinished:
        finding = describe_unfinished(unfinished, smi_index=1, timeout_s=timeout_s, node=node)
        hostname = read_hostname(unfinished.outputs[0]) if unfinished.outputs else None
        answer = Answer.UNFINISHED if unfinished.goes_on else Answer.ABANDONED
        return GpuReport(hostname=hostname, error=finding.message, findings=(finding,), answer=answer)
    except TunnelDown as error:
        return GpuReport(error=error.message, answer=Answer.NO_SESSION)  # the tunnel has its own finding
    except ExecError as error:
        finding = Finding("gpu-unknown", Severity.INFO, node, error.message, error.hint)
        return GpuReport(error=error.message, findings=(finding,), answer=Answer.NO_SESSION)
    hostname, took_s = read_hostname(hostname_answer), commands.last_duration_s
    try:
        report = await _ask_further(commands, gpus, processes, hostname=hostname, node=node, deadline=deadline)
    except (CommandsUnfinished, CommandsUnproven, ExecError, TunnelDown):  # the first answer stands
        report = build_gpu_report(gpus, processes, hostname=hostname, node=node)
    return replace(report, took_s=took_s)


async def _ask_further(
    commands: CommandRunner,
    gpus: CommandOutput,
    processes: CommandOutput,
    *,
    hostname: str | None,
    node: str | None,
    deadline: float,
) -> GpuReport:
    """The report on a host that has answered. Asks again with fewer fields if the driver is old, and for each GPU by
    itself if one GPU is lost. ``deadline`` is a time of the event loop."""
    loop = asyncio.get_running_loop()
    fields: Sequence[str] = FIELDS
    failure = classify_failure(gpus)
    if failure is not None and failure.code == "nvidia-smi-old":
        fields = OLD_FIELDS
        (gpus,) = await commands.run((build_query_command(fields),), timeout_s=deadline - loop.time())
        failure = classify_failure(gpus)
    if failure is not None and failure.code == "gpu-lost":
        time_left_s = deadline - loop.time()
        return await _probe_gpus_singly(
            commands, failure, fields, processes, hostname=hostname, node=node, timeout_s=time_left_s
        )
    return build_gpu_report(gpus, processes, hostname=hostname, fields=fields, node=node)


def build_query_command(fields: Sequence[str], *, gpu: int | None = None) -> Argv:
    """The command that prints these fields of all GPUs, or only of the GPU with the index ``gpu``."""
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
    commands: CommandRunner,
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
        argvs = [build_query_command(fields, gpu=index) for index in range(MAX_GPUS_ASKED_SINGLY)]
        outputs = await commands.run(argvs, timeout_s=timeout_s)
    except (
        CommandsUnfinished,
        CommandsUnproven,
        ExecError,
        TunnelDown,
    ):  # the GPUs stay unknown, but ``lost_failure`` is known
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


def _build_unproven_report(unproven: CommandsUnproven, node: str | None) -> GpuReport:
    """The report on a host that seems to run no commands. A table of GPUs is true all the same: a forced command may
    let nvidia-smi through. Any other text is the account's, and says nothing about nvidia-smi."""
    hostname_answer, gpus, processes = unproven.outputs
    if classify_failure(gpus) is None and read_gpus(gpus.output, FIELDS).gpus:
        return build_gpu_report(gpus, processes, hostname=read_hostname(hostname_answer), node=node)
    finding = describe_no_commands(unproven, node)
    return GpuReport(error=finding.message, findings=(finding,), answer=Answer.NO_COMMANDS)


def _failure_finding(failure: SmiFailure, node: str | None) -> Finding:
    return Finding(failure.code, failure.severity, node, failure.message, failure.hint)
