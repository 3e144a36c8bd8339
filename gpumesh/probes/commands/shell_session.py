"""``ShellSession``: one session of tunnels/remote_shell.py, and what the host has written in it."""

from __future__ import annotations

import re
from collections.abc import Callable

from gpumesh.errors import ExecError, OutputOverflow
from gpumesh.probes.commands.combined_commands import CommandOutput, split_script_output
from gpumesh.probes.smi_tables import OUTPUT_BYTES
from gpumesh.tunnels.base import OutputStream, ShellStream
from gpumesh.tunnels.remote_commands.remote_shell import END_LINE, KILL_LINE, READY_LINE

MAX_GREETING_BYTES = 1 << 20  # a login shell that writes more than this before it runs our command never runs it
GREETING_BYTES = 2000  # the end of what a login shell writes that is kept, for messages
_READY = re.compile(rb"\n?" + re.escape(READY_LINE) + rb"\r?\n")


class ShellEnded(Exception):
    """The shell's session has ended by itself. ``text`` is the end of what came before the first ready line."""

    def __init__(self, text: bytes) -> None:
        super().__init__("the shell's session has ended")
        self.text = text


class ShellFlooded(Exception):
    """The session writes without end, and our shell has not begun in it. ``text`` is the end of what came."""

    def __init__(self, text: bytes) -> None:
        super().__init__("the session writes without end")
        self.text = text


class ShellSession:
    """One session of remote_shell.py, and what it has written. A cancelled call loses nothing.

    ``script`` is the script that was started and whose process has not been collected yet; ``outputs`` are the outputs
    of its commands that have ended. ``started_at`` and ``opened_at`` are times of ``clock``. ``was_ready``: the login
    shell has come to our command. ``has_served``: a script has run to its end. ``is_cut``: a script wrote more than
    ``OUTPUT_BYTES``, so that the end of its output cannot be found.
    """

    def __init__(self, stream: ShellStream, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._buffer = b""  # what was written since the last ready line, except the outputs
        self._greeting = b""  # the last bytes before the shell was ready
        self._greeting_length = 0  # of all bytes, also those that were dropped
        self._is_ready = False
        self._kill_at: float | None = None  # a time of ``clock``; ``None``: no script runs, or it was killed
        self._count = 0  # of the script's commands
        self.opened_at = clock()
        self.started_at = self.opened_at
        self.was_ready = False
        self.has_served = False
        self.script: str | None = None
        self.outputs: list[CommandOutput] = []
        self.is_cut = False
        self.last_duration_s: float | None = None

    def __repr__(self) -> str:
        state = "READY" if self._is_ready else "RUNNING" if self.was_ready else "STARTING"
        return f"<ShellSession {state} {len(self.outputs)} outputs>"

    async def run(self, script: str, count: int, kill_after_s: float) -> list[CommandOutput]:
        """Runs the script, or waits for its end if it runs already, and returns the outputs of its ``count`` commands.
        There are fewer if the output was cut, or if the script was killed. ``kill_after_s``: ``kill_if_overdue`` may
        kill the script when it has run for so long.

        Raises ShellEnded, ShellFlooded, ExecError and TunnelDown.
        """
        if self.script is not None and self.script != script:
            await self._wait_script_end()  # of another call, which has given up; nobody wants the outputs
            if self.is_cut:
                raise ExecError("an earlier command wrote too much")
        if self.script is None:
            while not self._is_ready:
                await self._read()
            await self._start(script, count, kill_after_s)
        outputs = await self._wait_script_end()
        self.last_duration_s = self._clock() - self.started_at
        return outputs

    async def kill_if_overdue(self) -> None:
        """Kills the script that runs, once, if it has run for too long."""
        if self._kill_at is not None and self._clock() >= self._kill_at:
            self._kill_at = None
            await self._stream.write(KILL_LINE)

    async def close(self) -> None:
        await self._stream.close()

    async def _wait_script_end(self) -> list[CommandOutput]:
        """Waits for the end of the script that runs, and returns its outputs. The shell is ready again soon after."""
        while not self._is_script_over:
            await self._read()
        outputs, self.outputs = self.outputs, []
        self.script = self._kill_at = None
        self.has_served = True
        if not self._is_ready and not self.is_cut:
            await self._stream.write(END_LINE)
        return outputs

    @property
    def _is_script_over(self) -> bool:
        """Whether all commands have ended, or no more output is to be expected."""
        return len(self.outputs) == self._count or self._is_ready or self.is_cut

    async def _start(self, script: str, count: int, kill_after_s: float) -> None:
        """Starts the script. The shell must be ready."""
        self.script, self._count, self.outputs = script, count, []
        self._is_ready = False
        self.started_at = self._clock()
        self._kill_at = self.started_at + kill_after_s
        await self._stream.write(script.encode() + b"\n")

    async def _read(self) -> None:
        """Waits for a piece of output and evaluates it."""
        try:
            chunk = await self._stream.read()
        except OutputOverflow as error:
            if self.was_ready:
                raise
            raise ShellFlooded(self._greeting) from error
        if chunk.ended and chunk.exit_status is None:
            raise ExecError("the host ended the session in which commands run")
        if chunk.ended:
            raise ShellEnded(self._greeting.strip())
        if not self.was_ready:  # of both streams: a forced command may write its reason to either
            self._greeting = (self._greeting + chunk.data)[-GREETING_BYTES:]
            self._greeting_length += len(chunk.data)
        if chunk.stream is OutputStream.STDOUT:
            self._buffer += chunk.data
            self._evaluate_buffer()
        if not self.was_ready and self._greeting_length > MAX_GREETING_BYTES:
            raise ShellFlooded(self._greeting)

    def _evaluate_buffer(self) -> None:
        """Takes the ended commands' outputs and the ready line out of the buffer."""
        matches = list(_READY.finditer(self._buffer))
        ready = matches[-1] if matches else None
        complete_lines, rest = self._buffer, b""
        if ready is not None:
            complete_lines, rest = self._buffer[: ready.start()] + b"\n", self._buffer[ready.end() :]
        self._collect_outputs(complete_lines)
        if ready is not None:
            self._buffer = rest
            self.was_ready = self._is_ready = True
        elif len(self._buffer) > OUTPUT_BYTES:
            self.is_cut = self.was_ready
            self._buffer = self._buffer[-GREETING_BYTES:]

    def _collect_outputs(self, text: bytes) -> None:
        """Sets ``outputs`` from what was written since the script's start. A marker counts from its line's end on."""
        if self.script is not None and not self._is_ready:
            self.outputs = split_script_output(text[: text.rfind(b"\n") + 1], self._count)
