"""A program on a pseudo-terminal, as a person uses it: keys are pressed, the output is read, the modes are compared."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.real.warm_commands import WarmProcess, warm_commands

LIMIT_S = 45.0
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
_NewDecoder = codecs.getincrementaldecoder("utf-8")
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def without_control_sequences(text: str) -> str:
    return _CONTROL_SEQUENCE.sub("", text)


@dataclass
class Terminal:
    """``written`` is all output so far, with control sequences."""

    process: asyncio.subprocess.Process | WarmProcess
    controller: int
    modes_before: list[Any]
    written: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def plain_text(self) -> str:
        """The output without colours and cursor movements."""
        return without_control_sequences(self.written)

    def read(self) -> None:
        """Takes the output that is there; the event loop calls it."""
        try:
            self.written += self._decoder.decode(os.read(self.controller, 65536))
        except OSError:  # EIO: no process has the terminal open any more
            asyncio.get_running_loop().remove_reader(self.controller)
            self._hung_up.set()
        self._changed.set()

    async def wait_for_text(self, text: str, *, after: int = 0) -> int:
        """Waits until the plain text contains ``text`` behind position ``after``. Returns the position behind it."""
        async with asyncio.timeout(LIMIT_S):
            while (place := self.plain_text.find(text, after)) < 0:
                self._changed.clear()
                await self._changed.wait()
        return place + len(text)

    def press(self, keys: str) -> None:
        r"""``"\x03"`` is Ctrl-C: the terminal sends SIGINT to all processes of its foreground group."""
        os.write(self.controller, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.controller, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.controller)

    async def wait_exit(self) -> int:
        """The exit status, once the program and all processes that it left on the terminal have ended."""
        async with asyncio.timeout(LIMIT_S):
            status = await self.process.wait()
            await self._hung_up.wait()
        return status

    async def exits_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.process.wait()
        except TimeoutError:
            return False
        return True

    def is_restored(self) -> bool:
        """Whether modes, screen and cursor are as they were."""
        screen = self.written.rfind(LEAVE_SCREEN) >= self.written.rfind(ENTER_SCREEN)
        return self.modes() == self.modes_before and screen and self.written.count("\x1b[?25h") > 0


@contextlib.asynccontextmanager
async def run_on_terminal(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    columns: int = 120,
    rows: int = 40,
    out: Path | None = None,
    warm: bool = False,
) -> AsyncIterator[Terminal]:
    """Runs a program on a terminal of its own, and kills it if it still runs when the context ends. ``out``: the file
    that gets its standard output instead. ``warm``: the program is ``gpumesh``, as a fork (warm_commands.py)."""
    loop = asyncio.get_running_loop()
    controller, terminal_end = pty.openpty()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, controller)
        try:
            fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            modes = termios.tcgetattr(controller)
            stdout = terminal_end if out is None else stack.enter_context(out.open("wb")).fileno()
            streams = (terminal_end, stdout, terminal_end)
            process: asyncio.subprocess.Process | WarmProcess
            if warm:
                started = warm_commands().started(command, env=env, cwd=cwd, streams=streams, terminal=True)
                process = await stack.enter_async_context(started)
            else:
                process = await stack.enter_async_context(_started(command, env=env, cwd=cwd, streams=streams))
        finally:
            os.close(terminal_end)
        terminal = Terminal(process, controller, modes)
        loop.add_reader(controller, terminal.read)
        stack.callback(loop.remove_reader, controller)
        yield terminal


@contextlib.asynccontextmanager
async def _started(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, streams: Sequence[int]
) -> AsyncIterator[asyncio.subprocess.Process]:
    stdin, stdout, stderr = streams
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _take_terminal() -> None:
    """Runs in the new process, which leads a session: its standard input becomes the controlling terminal, so that a
    Ctrl-C typed there is a signal to it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
