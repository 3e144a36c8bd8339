"""A way to this machine as ``HostRoute``: real processes, with a real input and real outputs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping, Sequence

from gpumesh.tunnels.base import ExecChunk, ExecResult, OutputStream
from gpumesh.tunnels.direct.this_machine import run_command


class LocalStream:
    """A program's input and outputs. ``sent`` counts the heartbeats."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._chunks: asyncio.Queue[ExecChunk] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async def read(stream: OutputStream, pipe: asyncio.StreamReader | None) -> None:
            assert pipe is not None
            while data := await pipe.read(65536):
                await self._chunks.put(ExecChunk(stream, data))

        await asyncio.gather(
            read(OutputStream.STDOUT, self.process.stdout), read(OutputStream.STDERR, self.process.stderr)
        )
        status = await self.process.wait()
        await self._chunks.put(
            ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=status if status >= 0 else None)
        )

    async def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(data)
            await self.process.stdin.drain()

    async def read(self) -> ExecChunk:
        return await self._chunks.get()

    async def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


class LocalRoute:
    """Runs commands and programs here. ``shell``: the argv of the POSIX shell that takes the place of ``sh``;
    ``environment``: what the programs get in place of ours. ``login_shell``: the shell that gets each command as one
    line, as sshd does it."""

    def __init__(
        self,
        shell: Sequence[str] = ("sh",),
        environment: Mapping[str, str] | None = None,
        login_shell: str | None = None,
    ) -> None:
        self.shell = tuple(shell)
        self.login_shell = login_shell
        self.environment = dict(os.environ if environment is None else environment)
        self.streams: list[LocalStream] = []

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        prefix = ("env", "-i", *(f"{name}={value}" for name, value in self.environment.items()))
        return await run_command((*prefix, *self._replace_shell(argv)), timeout_s=timeout_s, limit_bytes=limit_bytes)

    async def open_program(self, argv: Sequence[str]) -> LocalStream:
        process = await asyncio.create_subprocess_exec(
            *self._replace_shell(argv),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=self.environment,
            start_new_session=True,
        )
        stream = LocalStream(process)
        self.streams.append(stream)
        return stream

    def _replace_shell(self, argv: Sequence[str]) -> tuple[str, ...]:
        if self.login_shell is not None:
            return (self.login_shell, "-c", shlex.join(argv))
        return (*self.shell, *argv[1:]) if argv[0] == "sh" else tuple(argv)


@contextlib.asynccontextmanager
async def local_route(
    shell: Sequence[str] = ("sh",), environment: Mapping[str, str] | None = None, login_shell: str | None = None
) -> AsyncIterator[LocalRoute]:
    """A route whose programs have ended after the block."""
    route = LocalRoute(shell, environment, login_shell)
    try:
        yield route
    finally:
        for stream in route.streams:
            await stream.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(stream.process.pid, signal.SIGKILL)
            await stream._reader
