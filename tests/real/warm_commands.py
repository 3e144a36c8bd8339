"""Runs `gpumesh` in a fork of a process that has imported its modules already (fork_server.py).

Python and the modules of a command take a third of a second of CPU to start, mostly more than what the command then
does. A fork takes a hundredth. The command is a process of its own all the same, with its own arguments, environment,
folder, standard streams and network. Two differences remain: it does not run the installed script, and in ``/proc`` it
has the command line and the environment of the process that it is a fork of. Where these matter, a test starts the
installed script (``Gpumesh.started``, ``Gpumesh.terminal``, and all commands in ``tests/real``).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.real import fork_server

OWN_NETWORK = Path("/proc/thread-self/ns/net")  # Linux only
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL")  # of this process's environment, for each command
_ROOT = Path(__file__).parents[2]
_PIPE_BYTES = 64 * 1024  # what a pipe takes before anything is read from it


class WarmCommands:
    """A fork server. It ends when this process does, or with ``close``. It is no child of this process, because some
    tests look at all children; and its environment is nearly empty, because some look for processes by a variable."""

    def __init__(self) -> None:
        self._control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far_end:
            subprocess.run(
                [sys.executable, "-m", fork_server.__name__, str(far_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=_ROOT,
                env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
                pass_fds=(far_end.fileno(),),
                check=True,
            )

    def close(self) -> None:
        self._control.close()

    async def run(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdin: str | None
    ) -> tuple[int, bytes, bytes]:
        """Runs a command to its end. Returns its exit code (or minus the number of the signal that ended it), and what
        it wrote to stdout and to stderr. When the caller is cancelled, the command is killed."""
        request = json.dumps({"command": list(command), "env": dict(env), "cwd": str(cwd)}).encode()
        with contextlib.ExitStack() as near_ends:
            status, far_status = socket.socketpair()
            near_ends.enter_context(status)
            with contextlib.ExitStack() as far_ends:
                far_ends.enter_context(far_status)
                fds = [far_status.fileno(), far_ends.enter_context(_standard_input(stdin))]
                streams = []
                for _ in ("stdout", "stderr"):
                    reader, writer = os.pipe()
                    streams.append(near_ends.enter_context(os.fdopen(reader, "rb", buffering=0)))
                    fds.append(far_ends.enter_context(os.fdopen(writer, "wb")).fileno())
                if OWN_NETWORK.exists():
                    fds.append(far_ends.enter_context(OWN_NETWORK.open()).fileno())
                socket.send_fds(self._control, [request], fds)
            code, out, err = await asyncio.gather(_read_all(status), *map(_read_all, streams))
        assert code, "the fork server has ended, or could not fork"
        return int(code), out, err


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


async def _read_all(stream: IO[bytes] | socket.socket) -> bytes:
    """All that comes until no process has the other end open."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    try:
        return await reader.read()
    finally:
        transport.close()
