"""Several short commands in one round trip over a tunnel's connection.

They travel as one ``sh -c`` of the form ``PATH=…; CMD 2>&1; echo "@gpumesh@ $?"; CMD 2>&1; echo "@gpumesh@ $?"``: one
channel, so that hosts with ``MaxSessions 1`` serve it, and a PATH with the places where nvidia-smi hides from
non-login shells (WSL, RunPod, vast.ai). On one line: csh allows no line break inside quotes. A host without a POSIX
shell is asked command by command.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpumesh.tunnels.base import ExecResult

OUTPUT_MARKER = "@gpumesh@"
EXTRA_SEARCH_PATH = "/usr/lib/wsl/lib:/usr/bin:/usr/local/nvidia/bin:/usr/local/cuda/bin:/opt/bin"
_OUTPUT_END = re.compile(rb"\n?@gpumesh@ ([0-9]{1,3})\r?(?:\n|\Z)")

Argv = tuple[str, ...]


class RunCommand(Protocol):
    """``Tunnel.exec`` fits. Raises TunnelDown and ExecError."""

    def __call__(self, argv: Sequence[str], *, timeout_s: float) -> Awaitable[ExecResult]: ...


@dataclass(frozen=True, slots=True)
class CommandOutput:
    """``output`` includes stderr. ``exit_status`` is ``None`` when a signal ended the command."""

    exit_status: int | None
    output: bytes


def build_script(commands: Sequence[Argv]) -> str:
    """The shell text that runs ``commands`` one after the other; ``split_script_output`` takes its output apart."""
    parts = [f"PATH=$PATH:{EXTRA_SEARCH_PATH}", "LC_ALL=C", "export PATH LC_ALL"]
    for command in commands:
        parts += [f"{shlex.join(command)} 2>&1", f'echo "{OUTPUT_MARKER} $?"']
    return "; ".join(parts)


def split_script_output(output: bytes, count: int) -> list[CommandOutput]:
    """The commands' outputs in order, at most ``count``; fewer when the output was cut or no POSIX shell ran it."""
    outputs: list[CommandOutput] = []
    start = 0
    for end in _OUTPUT_END.finditer(output):
        if len(outputs) == count:
            break
        outputs.append(CommandOutput(int(end[1]), output[start : end.start()]))
        start = end.end()
    return outputs


async def run_commands(run_command: RunCommand, commands: Sequence[Argv], *, timeout_s: float) -> list[CommandOutput]:
    """One output for each command. Raises TunnelDown, ExecError, and TimeoutError past ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        # Our own deadline comes before the connection's. So a TimeoutError is about the command, an ExecError about the
        # connection.
        connection_timeout_s = timeout_s + 1.0
        result = await run_command(("sh", "-c", build_script(commands)), timeout_s=connection_timeout_s)
        outputs = split_script_output(result.stdout, len(commands))
        if len(outputs) == len(commands):
            return outputs
        if outputs:  # a POSIX shell ran the script, and its output was cut or is not text
            outputs += [CommandOutput(result.exit_status, b"")] * (len(commands) - len(outputs))
            return outputs
        single_outputs = []
        for command in commands:
            result = await run_command(command, timeout_s=connection_timeout_s)
            single_outputs.append(CommandOutput(result.exit_status, result.stdout + result.stderr))
        return single_outputs
