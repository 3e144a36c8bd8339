"""Runs `gpumesh` in a fork of a process that has imported its modules already (fork_server.py).

Python and the modules of a command take a third of a second of CPU to start, mostly more than what the command then
does. A fork takes a hundredth. The command is a process of its own all the same, with its own arguments, environment,
folder, standard streams, terminal and network. So are the background mesh that it starts, and the zygote of a mesh
(spare_process.py). One difference remains: they do not run the installed script. Where this matters, a test starts the
installed script (``Gpumesh.started``, and all commands in ``tests/real``).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.real import fork_server

OWN_NETWORK = Path("/proc/thread-self/ns/net")  # Linux only
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL")  # of this process's environment, for each command
_ROOT = Path(__file__).parents[2]
_SHOWN_ARGUMENTS, _SHOWN_ENVIRONMENT = 8 * 1024, 16 * 1024  # bytes that a command has in ``/proc`` at most


class WarmCommands:
    """A fork server. It ends when this process does, or with ``close``. It is no child of this process, because some
    tests look at all children; and its environment is nearly empty, because some look for processes by a variable."""

    def __init__(self) -> None:
        self._control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        with far_end:
            subprocess.run(
                [sys.executable, "-m", fork_server.__name__, str(far_end.fileno()), " " * _SHOWN_ARGUMENTS],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=_ROOT,
                env={**kept, "SSL_CERT_FILE": os.devnull, "ROOM": " " * _SHOWN_ENVIRONMENT},
                pass_fds=(far_end.fileno(),),
                check=True,
            )

    def close(self) -> None:
        self._control.close()

    @contextlib.asynccontextmanager
    async def started(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        streams: Sequence[int],
        terminal: bool = False,
        network: Path = OWN_NETWORK,
    ) -> AsyncIterator[WarmProcess]:
        """A running command, killed if it still runs when the context ends. ``streams`` are its standard input, output
        and error. ``terminal``: it leads a session, and its standard input becomes the controlling terminal.
        ``network``: the namespace that it runs in."""
        request = {"command": list(command), "env": dict(env), "cwd": str(cwd), "terminal": terminal}
        near_end, far_end = socket.socketpair()
        with far_end, contextlib.ExitStack() as files:
            fds = [far_end.fileno(), *streams]
            if network.exists():
                fds.append(files.enter_context(network.open()).fileno())
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        reader, writer = await asyncio.open_connection(sock=near_end)
        process: WarmProcess | None = None
        try:
            pid = await reader.readline()
            assert pid, "the fork server has ended, or could not fork"
            process = WarmProcess(int(pid), asyncio.create_task(_read_exit_code(reader)))
            yield process
        finally:
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            writer.close()  # the fork server kills a command whose socket is closed
            await writer.wait_closed()

    @contextlib.asynccontextmanager
    async def piped(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        stdin: bool,
        network: Path = OWN_NETWORK,
    ) -> AsyncIterator[WarmProcess]:
        """As ``started``, with pipes at its standard streams. ``stdin``: otherwise its standard input is empty."""
        async with contextlib.AsyncExitStack() as stack:
            with contextlib.ExitStack() as far_ends:
                pipes: list[IO[bytes]] = []
                streams = []
                for number in range(3):
                    if number == 0 and not stdin:
                        streams.append(far_ends.enter_context(open(os.devnull, "rb")).fileno())
                        continue
                    reader, writer = (
                        os.fdopen(fd, mode, buffering=0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
                    )
                    near, far = (writer, reader) if number == 0 else (reader, writer)
                    streams.append(far_ends.enter_context(far).fileno())
                    pipes.append(stack.enter_context(near))
                started = self.started(command, env=env, cwd=cwd, streams=streams, network=network)
                process = await stack.enter_async_context(started)
            if stdin:
                process.stdin = await _open_writer(stack, pipes.pop(0))
            process.stdout, process.stderr = [await _open_reader(stack, pipe) for pipe in pipes]
            yield process

    async def run(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdin: str | None
    ) -> tuple[int, bytes, bytes]:
        """Runs a command to its end. Returns its exit code (or minus the number of the signal that ended it), and what
        it wrote to stdout and to stderr. When the caller is cancelled, the command is killed."""
        async with self.piped(command, env=env, cwd=cwd, stdin=stdin is not None) as process:
            out, err = await process.communicate(None if stdin is None else stdin.encode())
            return await process.wait(), out, err


class WarmProcess:
    """A command that runs, with the part of ``asyncio.subprocess.Process`` that tests use."""

    def __init__(self, pid: int, exit_code: asyncio.Task[int]) -> None:
        self.pid = pid
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._exit_code = exit_code

    @property
    def returncode(self) -> int | None:
        """``None`` while it runs."""
        return self._exit_code.result() if self._exit_code.done() else None

    async def wait(self) -> int:
        """Returns its exit code, or minus the number of the signal that ended it."""
        return await asyncio.shield(self._exit_code)

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    async def communicate(self, data: bytes | None = None) -> tuple[bytes, bytes]:
        """Gives it ``data`` as its standard input, and waits for its end. Returns all that is left to read."""
        if self.stdin is not None:
            with contextlib.suppress(ConnectionError):  # it may have ended without reading
                self.stdin.write(data or b"")
                await self.stdin.drain()
            self.stdin.close()
        assert self.stdout is not None
        assert self.stderr is not None
        out, err = await asyncio.gather(self.stdout.read(), self.stderr.read())
        await self.wait()
        return out, err

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


async def _read_exit_code(reader: asyncio.StreamReader) -> int:
    code = await reader.read()
    assert code, "the fork server has ended"
    return int(code)


async def _open_reader(stack: contextlib.AsyncExitStack, pipe: IO[bytes]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    stack.callback(transport.close)
    return reader


async def _open_writer(stack: contextlib.AsyncExitStack, pipe: IO[bytes]) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), pipe
    )
    stack.callback(transport.close)
    return asyncio.StreamWriter(transport, protocol, None, loop)


@functools.cache
def warm_commands() -> WarmCommands:
    """This process's own, started when it is first needed."""
    commands = WarmCommands()
    atexit.register(commands.close)
    return commands
