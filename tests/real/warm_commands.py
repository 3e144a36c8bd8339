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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.real import fork_server

OWN_NETWORK = Path("/proc/thread-self/ns/net")  # Linux only
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL")  # of this process's environment, for each command
_ROOT = Path(__file__).parents[2]
_SHOWN_ARGUMENTS, _SHOWN_ENVIRONMENT = 8 * 1024, 16 * 1024  # bytes that a command has in ``/proc`` at most
_PIPE_BYTES = 64 * 1024  # what a pipe takes before anything is read from it


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
                env={**kept, "ROOM": " " * _SHOWN_ENVIRONMENT},
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
    ) -> AsyncIterator[WarmProcess]:
        """A running command, killed if it still runs when the context ends. ``streams`` are its standard input, output
        and error. ``terminal``: it leads a session, and its standard input becomes the controlling terminal."""
        request = {"command": list(command), "env": dict(env), "cwd": str(cwd), "terminal": terminal}
        near_end, far_end = socket.socketpair()
        with far_end, contextlib.ExitStack() as network:
            fds = [far_end.fileno(), *streams]
            if OWN_NETWORK.exists():
                fds.append(network.enter_context(OWN_NETWORK.open()).fileno())
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        reader, writer = await asyncio.open_connection(sock=near_end)
        pid = await reader.readline()
        assert pid, "the fork server has ended, or could not fork"
        process = WarmProcess(int(pid), asyncio.create_task(_read_exit_code(reader)))
        try:
            yield process
        finally:
            writer.close()  # the fork server kills a command whose socket is closed
            await writer.wait_closed()
            process.stop_waiting()

    async def run(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdin: str | None
    ) -> tuple[int, bytes, bytes]:
        """Runs a command to its end. Returns its exit code (or minus the number of the signal that ended it), and what
        it wrote to stdout and to stderr. When the caller is cancelled, the command is killed."""
        with contextlib.ExitStack() as near_ends:
            async with contextlib.AsyncExitStack() as running:
                with contextlib.ExitStack() as far_ends:
                    streams = [far_ends.enter_context(_standard_input(stdin))]
                    readers = []
                    for _ in ("stdout", "stderr"):
                        reader, writer = os.pipe()
                        readers.append(near_ends.enter_context(os.fdopen(reader, "rb", buffering=0)))
                        streams.append(far_ends.enter_context(os.fdopen(writer, "wb")).fileno())
                    started = self.started(command, env=env, cwd=cwd, streams=streams)
                    process = await running.enter_async_context(started)
                out, err = await asyncio.gather(*map(_read_all, readers))
                return await process.wait(), out, err


class WarmProcess:
    """A command that runs, with the part of ``asyncio.subprocess.Process`` that tests use."""

    def __init__(self, pid: int, exit_code: asyncio.Task[int]) -> None:
        self.pid = pid
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

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def stop_waiting(self) -> None:
        self._exit_code.cancel()


async def _read_exit_code(reader: asyncio.StreamReader) -> int:
    code = await reader.read()
    assert code, "the fork server has ended"
    return int(code)


@functools.cache
def warm_commands() -> WarmCommands:
    """This process's own, started when it is first needed."""
    commands = WarmCommands()
    atexit.register(commands.close)
    return commands


@contextlib.contextmanager
def _standard_input(text: str | None) -> Iterator[int]:
    """A descriptor: a pipe that holds all of ``text``, or one that is empty for ever."""
    if text is None:
        with open(os.devnull, "rb") as nothing:
            yield nothing.fileno()
        return
    data = text.encode()
    assert len(data) <= _PIPE_BYTES
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        with os.fdopen(writer, "wb") as stream:
            stream.write(data)
        yield pipe.fileno()


async def _read_all(stream: IO[bytes]) -> bytes:
    """All that comes until no process has the other end open."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    try:
        return await reader.read()
    finally:
        transport.close()
