"""The master: the ``ssh`` child that holds the connection, with its control socket and its echoing session.

Its life, as ``MasterState``::

    STARTING ──logged in──▶ WITHOUT_SESSION   (ssh -N, where the host allows no command)
        │
        └─────logged in──▶ SILENT ──first echo──▶ ECHOING          (any state ──the process ended──▶ EXITED)

A login shell may take seconds to start ``cat``, and a forced command may never echo. In both cases the master is
SILENT.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from gpumesh.config import environment
from gpumesh.errors import TransportUnsupported
from gpumesh.text.lines import LineBuffer
from gpumesh.text.printable import printable
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.local_system import child_process
from gpumesh.tunnels.openssh.errors import FORBIDDEN_TEXT, NO_TERMINAL_TEXT
from gpumesh.tunnels.openssh.ssh_output import SshLog, SshOutput, log_path
from gpumesh.tunnels.transport import PING_RESEND_S

READ_BYTES = 32 * 1024  # the most that one read of a pipe takes
LINE_LIMIT = 4096  # bytes of a line of ssh's output
MAX_SHOWN_CHARS = 300  # a line of ssh's stderr is cut to this length for messages
POLL_S = 0.01  # time between two checks whether the control socket is there
# A host that writes without end (a forced command) is read slowly, which stops it: this many bytes at once, and then
# ``READ_BYTES`` in each pause. The bytes come back at the given rate, for a connection of weeks.
FLOOD_BYTES = 512 * 1024
FLOOD_PAUSE_S = 1.0
_ALLOWED_BYTES_PER_S = 4096
STOP_TIMEOUT_S = 1.0  # the time for ssh to end after SIGTERM, and again after SIGKILL


class MasterState(StrEnum):
    STARTING = "starting"
    WITHOUT_SESSION = "without-session"
    SILENT = "silent"
    ECHOING = "echoing"
    EXITED = "exited"


_NEXT_STATES = {
    MasterState.STARTING: {MasterState.WITHOUT_SESSION, MasterState.SILENT, MasterState.EXITED},
    MasterState.WITHOUT_SESSION: {MasterState.EXITED},
    MasterState.SILENT: {MasterState.ECHOING, MasterState.EXITED},
    MasterState.ECHOING: {MasterState.EXITED},
    MasterState.EXITED: set(),
}


class OpensshMaster:
    """The ``ssh`` child that holds the connection. ``control`` is the path of its control socket.

    ``output`` are the last lines that it and others have printed. ``on_error_line`` is called with each new line of its
    log. ``refused_forwards`` counts the lines in which ssh reported that the host forbids forwarding. ``has_echoed``:
    its session has run ``cat``. ``login_shell_reads``: something before ``cat``, as a line of ``.bashrc``, has read our
    first line. ``exit_task`` ends when the process has ended.
    """

    def __init__(self, process: Process, control: Path, log: SshLog) -> None:
        self.process = process
        self.control = control
        self.state = MasterState.STARTING
        self.output = SshOutput()
        self.refused_forwards = 0
        self.has_echoed = False
        self.login_shell_reads = False
        self.on_error_line: Callable[[str], None] = lambda _: None
        self._nonce = secrets.token_hex(8)  # begins each line that we send, so that no greeting passes for an echo
        self._line_ids = itertools.count()
        self._pending_echoes: dict[bytes, asyncio.Future[float]] = {}  # by line; the result: when the echo came
        self._log = log
        readers = (self._read_log(), self._read_stderr(), self._read_echoes())
        self._readers = [asyncio.create_task(reader) for reader in readers]
        self.exit_task = asyncio.create_task(self._wait_for_exit())

    def __repr__(self) -> str:
        return f"<OpensshMaster pid {self.process.pid} {self.state.upper()}>"

    @classmethod
    async def start(cls, command: list[str], control: Path, askpass: Path | None) -> OpensshMaster:
        """Starts ``ssh`` with this command line, which names ``log_path(control)`` as its log. ``askpass``: the program
        that answers the questions of ssh, if any.

        Raises TransportUnsupported when ``ssh`` cannot be run.
        """
        # Without ``askpass``, nobody answers ssh: it may not ask a program that the user's own SSH_ASKPASS names.
        # ``None`` removes that variable.
        environment_changes: dict[str, str | None] = {"SSH_ASKPASS": None, "SSH_ASKPASS_REQUIRE": "never"}
        if askpass is not None:
            # DISPLAY: without this variable, whatever its value, ssh before 8.4 does not run the program.
            display = environment.display() or "gpumesh:0"
            environment_changes = {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": display}
        log = await SshLog.open(log_path(control))
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=environment.child_environment(environment_changes),
                # In its own session, ssh has no terminal for questions, and one process group with its ProxyCommand.
                start_new_session=True,
                # Safe: the worker has no threads of its own yet.
                preexec_fn=partial(child_process.die_with_parent, os.getpid()),
            )
        except BaseException as error:
            log.close()
            if not isinstance(error, OSError):
                raise
            message = f"ssh cannot be run: {error.strerror}"
            raise TransportUnsupported(message, hint="install OpenSSH's client, or use transport: sshtunnel") from error
        return cls(process, control, log)

    @property
    def exited(self) -> bool:
        """Whether the process has ended and its output has been read."""
        return self.state is MasterState.EXITED

    async def wait_logged_in(self, deadline: Deadline, *, session: bool) -> bool:
        """Waits until ssh is logged in (then its control socket is there), and returns true; false if ssh has ended.

        ``session``: ssh was started with a session. Raises ``TimeoutError``.
        """
        while not self.control.exists():
            if self.exited:
                return False
            if deadline.expired:
                raise TimeoutError
            await asyncio.wait([self.exit_task], timeout=POLL_S)
        self._advance(MasterState.SILENT if session else MasterState.WITHOUT_SESSION)
        return True

    async def measure_round_trip_ms(self, timeout_s: float) -> float | None:
        """Sends a line, and returns the time until the host echoes it in ms; ``None``: no echo within ``timeout_s``.

        While no echo comes, another line is sent every ``PING_RESEND_S``. The echo of any of the lines counts, and the
        time begins with the first line.
        """
        loop = asyncio.get_running_loop()
        sent_at = time.perf_counter()
        echoes: dict[bytes, asyncio.Future[float]] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    line = f"{self._nonce} {next(self._line_ids)}".encode()
                    echoes[line] = self._pending_echoes[line] = loop.create_future()
                    await self._write_line(line)
                    echoes_or_exit: list[asyncio.Future[Any]] = [*echoes.values(), self.exit_task]
                    await asyncio.wait(echoes_or_exit, timeout=PING_RESEND_S, return_when=asyncio.FIRST_COMPLETED)
                    first_echo = next((echo for echo in echoes.values() if echo.done()), None)
                    if first_echo is not None:
                        return (first_echo.result() - sent_at) * 1000
                    if self.exit_task.done():
                        return None
        except (TimeoutError, ConnectionError):  # ConnectionError: ssh has closed its input, because it is ending
            return None
        finally:
            for line in echoes:
                del self._pending_echoes[line]

    async def close(self) -> None:
        """Ends ssh and all processes that it started. May be called twice."""
        if not self.exit_task.done():
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            await asyncio.wait([self.exit_task], timeout=STOP_TIMEOUT_S)
        # Also after ssh has ended: a ProxyCommand of its process group may still run. For a group without a living
        # process, macOS may raise PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await asyncio.wait([self.exit_task], timeout=STOP_TIMEOUT_S)
        for task in (*self._readers, self.exit_task):
            task.cancel()
        await asyncio.gather(*self._readers, self.exit_task, return_exceptions=True)
        self._log.close()
        self._advance(MasterState.EXITED)

    def _advance(self, state: MasterState) -> None:
        """Changes to ``state`` if it can follow the present state. An event that comes too late changes nothing."""
        if state in _NEXT_STATES[self.state]:
            self.state = state

    async def _write_line(self, line: bytes) -> None:
        assert self.process.stdin is not None, "ssh was started without a pipe as its input"
        if self.process.stdin.transport.get_write_buffer_size():
            return  # nobody reads the lines before this: it would wait in our memory
        self.process.stdin.write(line + b"\n")
        await self.process.stdin.drain()

    async def _wait_for_exit(self) -> None:
        """Waits until the process has ended and its output has been read; then the state is EXITED."""
        await self.process.wait()
        self._log.end()
        await asyncio.wait(self._readers, timeout=STOP_TIMEOUT_S)  # a ProxyCommand that still runs may hold stderr open
        self._advance(MasterState.EXITED)

    async def _read_log(self) -> None:
        """Keeps, counts and reports the lines of ssh's log until its end."""
        async for line in _read_lines(self._log.reader):
            text = self.output.add_log_line(printable(line, MAX_SHOWN_CHARS))
            if text is None:
                continue
            if FORBIDDEN_TEXT in text:
                self.refused_forwards += 1
            self.on_error_line(text)

    async def _read_stderr(self) -> None:
        """Keeps the lines of stderr until its end: they come from the host or from a ProxyCommand."""
        async for line in _read_lines(self.process.stderr):
            self.output.add_stderr_line(printable(line, MAX_SHOWN_CHARS))

    async def _read_echoes(self) -> None:
        """Assigns the lines of stdout to the lines that wait for their echo, until the end of stdout.

        A line with our nonce is an echo, also if no ping waits for it any more. Other lines, such as a greeting, are
        dropped.
        """
        async for line in _read_lines(self.process.stdout):
            if line.startswith(self._nonce.encode()):
                if not self.has_echoed:
                    is_first_line = line.split()[-1] == b"0"  # the lines that we send are numbered from 0
                    self.login_shell_reads = not is_first_line
                self._advance(MasterState.ECHOING)
                self.has_echoed = True
            echo = self._pending_echoes.get(line.strip())
            if echo is not None and not echo.done():
                echo.set_result(time.perf_counter())
            elif NO_TERMINAL_TEXT.encode() in line:  # RunPod's proxy writes this error to stdout
                self.output.add_log_line(printable(line, MAX_SHOWN_CHARS))


async def _read_lines(pipe: asyncio.StreamReader | None) -> AsyncIterator[bytes]:
    """Yields the lines of a hostile stream. A line longer than ``LINE_LIMIT`` is cut. A stream that floods is read
    slowly."""
    assert pipe is not None, "ssh was started without this pipe"
    buffer = LineBuffer(LINE_LIMIT, cut=True)
    allowed_bytes, read_at = float(FLOOD_BYTES), time.monotonic()
    while data := await pipe.read(READ_BYTES):
        now = time.monotonic()
        allowed_bytes = min(FLOOD_BYTES, allowed_bytes + (now - read_at) * _ALLOWED_BYTES_PER_S) - len(data)
        read_at = now
        if allowed_bytes < 0:
            allowed_bytes = 0.0
            await asyncio.sleep(FLOOD_PAUSE_S)
        for line in buffer.feed(data):
            yield line
    if rest := buffer.take_partial():
        yield rest
