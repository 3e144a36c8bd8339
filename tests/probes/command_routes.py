"""Routes to hosts for ``HostCommands``, whose answers a test gives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpumesh.probes.commands.host_commands import HostCommands
from gpumesh.tunnels.base import ExecChunk, ExecResult, OutputStream, ShellStream


class RunCommand(Protocol):
    def __call__(self, argv: Sequence[str], *, timeout_s: float) -> Awaitable[ExecResult]: ...


@dataclass
class ScriptedShell:
    """A shell on a host that writes ``chunks``. What is written to it goes to ``on_write``, and into ``written``."""

    chunks: asyncio.Queue[ExecChunk] = field(default_factory=asyncio.Queue)
    written: list[bytes] = field(default_factory=list)
    on_write: Callable[[bytes], None] = lambda _: None
    closed: bool = False

    def say(self, text: bytes, stream: OutputStream = OutputStream.STDOUT) -> None:
        self.chunks.put_nowait(ExecChunk(stream, text))

    def end(self, status: int | None) -> None:
        self.chunks.put_nowait(ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=status))

    async def write(self, data: bytes) -> None:
        self.written.append(data)
        self.on_write(data)

    async def read(self) -> ExecChunk:
        return await self.chunks.get()

    async def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedRoute:
    """``exec`` is a function of the test. ``shells`` are what ``open_shell`` returns, in order."""

    run_command: RunCommand
    shells: list[ShellStream | None] = field(default_factory=list)
    calls: list[tuple[str, ...]] = field(default_factory=list)

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        del limit_bytes, shareable
        self.calls.append(tuple(argv))
        return await self.run_command(argv, timeout_s=timeout_s)

    async def open_shell(self) -> ShellStream | None:
        return self.shells.pop(0)


def run_directly(run_command: RunCommand) -> HostCommands:
    """As on this machine: each command is run by ``run_command``, without a session."""
    return HostCommands(ScriptedRoute(run_command, [None] * 20), clock=time.monotonic)


def run_over_ssh(run_command: RunCommand, text: bytes, status: int) -> HostCommands:
    """As on a host whose session writes ``text`` instead of running our shell, and ends with ``status``."""
    shell = ScriptedShell()
    shell.say(text)
    shell.end(status)
    return HostCommands(ScriptedRoute(run_command, [shell]), clock=time.monotonic)
