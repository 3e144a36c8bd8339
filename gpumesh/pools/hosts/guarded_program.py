"""A program of a pool on a host, under the guard of ``guard_script.py``: its output, its end, and ending it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from gpumesh.errors import ExecError, GPUMeshError, TunnelError
from gpumesh.pools.hosts.guard_script import (
    HEARTBEAT,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_LIMIT_S,
    KILL_AFTER_S,
    STOP,
    guarded_argv,
)
from gpumesh.pools.hosts.route import HostRoute
from gpumesh.text.lines import LineBuffer
from gpumesh.text.printable import printable
from gpumesh.tunnels.base import ExecChunk, OutputStream, ProgramStream

MAX_LINE_BYTES = 4096  # of a line of output; the rest of a longer line is dropped
MAX_WAITING_LINES = 4096  # lines that nobody has taken yet; older ones are dropped, so that the program never waits
LAST_LINES = 20
# The time for the program to end after its input has ended: both signals, and the way there and back.
END_TIMEOUT_S = KILL_AFTER_S + 4.0


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How a program ended. ``exit_status`` is ``None`` if it is not known: then ``error`` may say why. ``last_lines``
    of its output are safe to print."""

    exit_status: int | None
    last_lines: tuple[str, ...] = ()
    error: GPUMeshError | None = None

    def __str__(self) -> str:
        """What became of the program, to follow its name: ``ended with status 1``."""
        if self.error is not None:
            return f"was cut off: {self.error}"
        status = self.exit_status
        if status is None:
            return "was cut off"
        if status > 128:
            return f"was ended by {_signal_name(status - 128)}"
        if status == 127:
            return "cannot be started: there is no such program"
        if status == 126:
            return "cannot be started: the file may not be executed, or is for another kind of machine"
        return f"ended with status {status}"

    def describe(self, reason: str | None = None) -> str:
        """The same with the ``reason``; ``None``: with the last line of the output, if there is one."""
        reason = reason or (self.last_lines[-1] if self.last_lines else None)
        return f"{self}: {reason}" if reason else str(self)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class GuardedProgram:
    """A running program. ``run_guarded`` makes it."""

    def __init__(self, stream: ProgramStream) -> None:
        self._stream = stream
        self._buffer = LineBuffer(MAX_LINE_BYTES, cut=True)
        self._waiting_lines: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._changed = asyncio.Event()  # a line came, or the program ended
        self._ended = asyncio.Event()
        self._end: ProgramEnd | None = None

    def __repr__(self) -> str:
        state = "RUNNING" if self._end is None else f"ENDED {self._end.exit_status}"
        return f"<GuardedProgram {state} {len(self._waiting_lines)} lines wait>"

    @property
    def end(self) -> ProgramEnd | None:
        """How the program ended; ``None`` while it runs."""
        return self._end

    async def lines(self) -> AsyncIterator[str]:
        """Yields the lines of both outputs, safe to print, until the program has ended. One task may use it at a time.

        A run of dots without a line end is a line too: llama.cpp shows its progress so.
        """
        while True:
            while self._waiting_lines:
                yield self._waiting_lines.popleft()
            if self._end is not None:
                return
            self._changed.clear()
            await self._changed.wait()

    async def wait_ended(self) -> ProgramEnd:
        """Waits for the program's end."""
        await self._ended.wait()
        assert self._end is not None, "it is set before the event"
        return self._end

    async def stop(self, *, timeout_s: float = END_TIMEOUT_S) -> ProgramEnd:
        """Ends the program, and waits for its end at most ``timeout_s``. When the host does not answer, the guard ends
        it there, once no more heartbeat comes. May be called twice."""
        try:
            with contextlib.suppress(TimeoutError, TunnelError, ExecError):
                async with asyncio.timeout(timeout_s):
                    if self._end is None:
                        await self._stream.write(STOP)
                    await self.wait_ended()
        finally:  # from here on, the guard on the host also sees the end of its input
            with contextlib.suppress(TunnelError, ExecError):
                await self._stream.close()
        return self._end or ProgramEnd(None, tuple(self._last_lines))

    async def read_output(self) -> None:
        """Reads the output until the program has ended."""
        error: GPUMeshError | None = None
        exit_status: int | None = None
        try:
            while True:
                chunk = await self._stream.read()
                self._take(chunk)
                if chunk.ended:
                    exit_status = chunk.exit_status
                    break
        except (TunnelError, ExecError) as caught:
            error = caught
        finally:  # also after a bug of ours: nobody may wait for ever
            self._add_line(self._buffer.take_partial())
            self._end = ProgramEnd(exit_status, tuple(self._last_lines), error)
            self._ended.set()
            self._changed.set()

    async def send_heartbeats(self, interval_s: float) -> None:
        """Tells the guard that we live, until the program has ended or cannot be reached."""
        with contextlib.suppress(TunnelError, ExecError):  # ``read_output`` has the reason
            while not self._ended.is_set():
                await self._stream.write(HEARTBEAT)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval_s):
                        await self._ended.wait()

    def _take(self, chunk: ExecChunk) -> None:
        if chunk.stream is not OutputStream.STDOUT:  # the guard's own messages; the program's are all in stdout
            return
        for line in self._buffer.feed(chunk.data):
            self._add_line(line)
        partial = self._buffer.take_partial()
        if partial and not partial.strip(b"."):
            self._add_line(partial)
        else:
            self._buffer.feed(partial)

    def _add_line(self, line: bytes) -> None:
        text = printable(line, MAX_LINE_BYTES)
        if text:
            self._waiting_lines.append(text)
            self._changed.set()
            if text.strip("."):
                self._last_lines.append(text)


@contextlib.asynccontextmanager
async def run_guarded(
    route: HostRoute,
    argv: Sequence[str],
    *,
    limit_s: float = HEARTBEAT_LIMIT_S,
    heartbeat_s: float = HEARTBEAT_INTERVAL_S,
    kill_after_s: float = KILL_AFTER_S,
) -> AsyncIterator[GuardedProgram]:
    """Runs ``argv`` on the route's host during the block. The end of the block ends the program.

    ``limit_s``: the host ends the program when it has heard nothing from us for so long. ``heartbeat_s``: how often it
    hears from us. ``kill_after_s``: the time between SIGTERM and SIGKILL. Raises TunnelDown, and ExecError when the
    program cannot be started; a host that gives no session shows in ``wait_ended``.
    """
    stream = await route.open_program(guarded_argv(argv, limit_s=limit_s, kill_after_s=kill_after_s))
    program = GuardedProgram(stream)
    # Not a TaskGroup: an exception of the block should reach the caller unchanged, not in a group.
    tasks = (asyncio.create_task(program.read_output()), asyncio.create_task(program.send_heartbeats(heartbeat_s)))
    try:
        yield program
    finally:
        try:
            await program.stop(timeout_s=kill_after_s + END_TIMEOUT_S - KILL_AFTER_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
