"""Runs several short commands on a host in one round trip, also where nvidia-smi is in an unusual folder.

The commands are sent as one shell script: ``PATH=…; CMD 2>&1; echo "@gpumesh@ $?"; CMD 2>&1; echo "@gpumesh@ $?"``.
The script needs one channel only, so a host with ``MaxSessions 1`` accepts it. It adds to PATH the folders where
nvidia-smi is on hosts whose non-login shells do not find it (WSL, RunPod, vast.ai). It is one line, because csh allows
no line break inside quotes. On a host without a POSIX shell each command is run by itself.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from gpumesh.tunnels.base import ExecResult

OUTPUT_MARKER = "@gpumesh@"
EXTRA_SEARCH_PATH = "/usr/lib/wsl/lib:/usr/bin:/usr/local/nvidia/bin:/usr/local/cuda/bin:/opt/bin"
# The marker and the exit status, at the end of each command's output.
_OUTPUT_END = re.compile(rb"\n?@gpumesh@ (?P<exit_status>[0-9]{1,3})\r?(?:\n|\Z)")

Argv = tuple[str, ...]


class RunCommand(Protocol):
    """Runs one command on a host, as ``Tunnel.exec`` does. Raises TunnelDown and ExecError."""

    def __call__(self, argv: Sequence[str], *, timeout_s: float) -> Awaitable[ExecResult]: ...


class CommandRunner(Protocol):
    """Runs several commands on a host; see ``host_commands.HostCommands``."""

    @property
    def last_duration_s(self) -> float | None: ...

    async def run(self, commands: Sequence[Argv], *, timeout_s: float) -> list[CommandOutput]: ...


@dataclass(frozen=True, slots=True)
class CommandOutput:
    """The result of one command. ``output`` includes stderr. ``exit_status`` is ``None`` if a signal ended the
    command. ``is_cut``: more was written than we read, so neither output nor exit status is known."""

    exit_status: int | None
    output: bytes
    is_cut: bool = False


def build_script(commands: Sequence[Argv]) -> str:
    """The shell script that runs ``commands`` one after the other; ``split_script_output`` splits its output."""
    parts = [f"PATH=$PATH:{EXTRA_SEARCH_PATH}", "LC_ALL=C", "export PATH LC_ALL"]
    for command in commands:
        parts += [f"{shlex.join(command)} 2>&1", f'echo "{OUTPUT_MARKER} $?"']
    return "; ".join(parts)


def split_script_output(output: bytes, count: int) -> list[CommandOutput]:
    """Splits the output of ``build_script`` into the outputs of its first ``count`` commands, in order. There are fewer
    if the output was cut, and none if no POSIX shell ran the script."""
    outputs: list[CommandOutput] = []
    start = 0
    for marker in islice(_OUTPUT_END.finditer(output), count):
        outputs.append(CommandOutput(int(marker["exit_status"]), output[start : marker.start()]))
        start = marker.end()
    return outputs


async def run_one_by_one(run_command: RunCommand, commands: Sequence[Argv], *, timeout_s: float) -> list[CommandOutput]:
    """Runs each command by itself, on a host where no POSIX shell runs a script. Raises as ``run_command``."""
    outputs = []
    for command in commands:
        result = await run_command(command, timeout_s=timeout_s)
        outputs.append(CommandOutput(result.exit_status, result.stdout + result.stderr))
    return outputs


async def run_commands(run_command: RunCommand, commands: Sequence[Argv], *, timeout_s: float) -> list[CommandOutput]:
    """Runs the commands on a host, and returns one output for each, in order. If the script's output was cut, the
    commands after the cut have empty outputs. Raises TunnelDown, ExecError, and TimeoutError after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        # The deadline of this block comes 1 s before the connection's. So a TimeoutError means that the commands were
        # slow, and an ExecError means that the connection failed.
        connection_timeout_s = timeout_s + 1.0
        result = await run_command(("sh", "-c", build_script(commands)), timeout_s=connection_timeout_s)
        outputs = split_script_output(result.stdout, len(commands))
        if len(outputs) == len(commands):
            return outputs
        if outputs:  # a POSIX shell ran the script, and its output was cut or is not text
            missing_output = CommandOutput(result.exit_status, b"", is_cut=result.truncated)
            return outputs + [missing_output] * (len(commands) - len(outputs))
        return await run_one_by_one(run_command, commands, timeout_s=connection_timeout_s)
