"""Runs commands on the host: each command is an ``ssh`` process, a client of the master's control socket."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path

from gpumesh.config import environment
from gpumesh.errors import ExecError, SessionRefused
from gpumesh.text.printable import printable
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.local_system.local_command import exit_status, release_process, wait_for_exit
from gpumesh.tunnels.openssh.errors import NO_SESSION_PATTERN
from gpumesh.tunnels.openssh.login import SSH_FAILED
from gpumesh.tunnels.openssh.options import CLIENT_HOST, client_command
from gpumesh.tunnels.remote_commands.remote_command import wrap_killable

READ_BYTES = 32 * 1024  # the most that one read of a pipe takes
STDERR_TAIL_BYTES = 1000  # the end of a command's stderr that is kept, to find ssh's own error in it
STOP_TIMEOUT_S = 1.0  # the time for a client to end by itself, and again after it was killed


class Ending(StrEnum):
    """What ends a command on the host when the session's input ends."""

    WRAPPED = "wrapped"  # a POSIX shell around the command (remote_command.py)
    BY_ITSELF = "by-itself"  # the command, which reads its input
    UNKNOWN = "unknown"  # nothing that we know of: the command has no input


async def start_client(
    control: Path,
    command: str,
    *,
    ending: Ending,
    is_master_alive: Callable[[], Awaitable[bool]],
    on_refused: Callable[[], None],
) -> MuxCommand:
    """Starts ``command`` on the host. ``MuxCommand`` explains the functions.

    Except with ``Ending.UNKNOWN`` its input is a pipe that we hold open.
    """
    command_line = wrap_killable(command) if ending is Ending.WRAPPED else command
    process = await asyncio.create_subprocess_exec(
        *client_command(control, "--", CLIENT_HOST, command_line),
        stdin=DEVNULL if ending is Ending.UNKNOWN else PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=environment.child_environment(),
    )
    return MuxCommand(process, is_master_alive, on_refused)


async def request_session(control: Path) -> None:
    """Asks the host for a session, and returns when the host has given or refused it. A cancel kills the client.

    The host's sshd answers by itself: the session is for a subsystem that no host has, so neither a login shell nor a
    forced command is started. sshd logs a line about it.
    """
    process = await asyncio.create_subprocess_exec(
        *client_command(control, "-s", "--", CLIENT_HOST, "gpumesh-ping"),
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=PIPE,
        env=environment.child_environment(),
    )
    try:
        await wait_for_exit(process)
    finally:
        await _end_process(process, patience_s=0.0)


class MuxCommand:
    """A command on the host; see ``transport.RemoteCommand``. ``is_master_alive`` pings the master and returns
    whether it answers: if it does not, a command that ended with status 255 was cut off. ``on_refused`` is called if
    the host gives no session for the command."""

    def __init__(
        self, process: Process, is_master_alive: Callable[[], Awaitable[bool]], on_refused: Callable[[], None]
    ) -> None:
        self._process = process
        self._is_master_alive = is_master_alive
        self._on_refused = on_refused
        # A short queue, so that a slow reader stops ssh. ``None``: one of the two pipes has ended.
        self._pieces: asyncio.Queue[tuple[OutputStream, bytes] | None] = asyncio.Queue(maxsize=4)
        self._stderr_tail = b""  # shows whether ssh or the command failed
        self._open_streams = 2  # of stdout and stderr
        self._readers = [
            asyncio.create_task(self._read_pipe(OutputStream.STDOUT, process.stdout)),
            asyncio.create_task(self._read_pipe(OutputStream.STDERR, process.stderr)),
        ]

    @property
    def exit_status(self) -> int | None:
        return exit_status(self._process)

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def read(self) -> tuple[OutputStream, bytes] | None:
        """See ``transport.RemoteCommand``. After the last piece, raises ExecError if ssh itself failed."""
        while self._open_streams:
            piece = await self._pieces.get()
            if piece is not None:
                return piece
            self._open_streams -= 1
        await self._process.wait()
        if self._process.returncode == SSH_FAILED:
            await self._ensure_ssh_worked()
        return None

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None, "the command was started without input"
        with contextlib.suppress(ConnectionError):  # the command has ended, which ``read`` reports
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    async def kill(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # the end of its input ends the command
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await _end_process(self._process, patience_s=STOP_TIMEOUT_S)

    async def _ensure_ssh_worked(self) -> None:
        """Called for exit status 255: raises ExecError if ssh failed, returns if the command ended with this status.

        ssh failed if it printed that there is no session, or if the connection is gone.
        """
        stderr_lines = self._stderr_tail.decode("utf-8", "replace").splitlines()
        refusal = next((line for line in stderr_lines if NO_SESSION_PATTERN.search(line)), None)
        if refusal is not None:
            self._on_refused()
            raise SessionRefused(
                f"the host gives no session to run a command in ({printable(refusal, 120)})",
                hint="its sshd forbids it, or MaxSessions is reached",
            )
        if not await self._is_master_alive():
            raise ExecError("the connection broke while the command ran")

    async def _read_pipe(self, stream: OutputStream, pipe: asyncio.StreamReader | None) -> None:
        """Puts the pieces of one pipe into the queue, and ``None`` at the pipe's end."""
        assert pipe is not None, "ssh was started without this pipe"
        while data := await pipe.read(READ_BYTES):
            if stream is OutputStream.STDERR:
                self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL_BYTES:]
            await self._pieces.put((stream, data))
        await self._pieces.put(None)


async def _end_process(process: Process, patience_s: float) -> None:
    """Kills the process, unless it ends by itself within ``patience_s``, and waits for its end. 0: kills it at once."""
    if patience_s > 0.0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await wait_for_exit(process)
                return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await release_process(process, STOP_TIMEOUT_S)
