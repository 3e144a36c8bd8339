"""Runs the command on a pseudo-terminal: tests press keys, read what is written, and compare the terminal's modes
before and after."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.real.command import GPUMESH, Gpumesh

LIMIT_S = 30.0
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"


@dataclass
class Terminal:
    """``written`` is everything that the command has written."""

    process: asyncio.subprocess.Process
    controller: int
    modes_before: list[Any]
    written: str = ""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def plain_text(self) -> str:
        """The written text without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.written)

    def add_output(self, data: bytes) -> None:
        self.written += data.decode("utf-8", "replace")
        self._changed.set()

    async def wait_for_text(self, text: str, *, after: int = 0) -> int:
        """Waits until ``text`` is written after the position ``after``. Gives the position behind it."""
        async with asyncio.timeout(LIMIT_S):
            while (position := self.plain_text.find(text, after)) < 0:
                self._changed.clear()
                await self._changed.wait()
        return position + len(text)

    def press(self, keys: str) -> None:
        os.write(self.controller, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.controller, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.controller)

    async def wait_exit(self) -> int:
        async with asyncio.timeout(LIMIT_S):
            code = await self.process.wait()
        self._read_rest()
        return code

    def _read_rest(self) -> None:
        """Reads what the command wrote last. The event loop may not have come to that yet."""
        with contextlib.suppress(OSError):
            while select.select([self.controller], [], [], 0)[0]:
                self.add_output(os.read(self.controller, 65536))

    async def exits_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.process.wait()
        except TimeoutError:
            return False
        return True

    def is_restored(self) -> bool:
        """Whether modes and screen are as they were."""
        screen = self.written.rfind(LEAVE_SCREEN) >= self.written.rfind(ENTER_SCREEN)
        return self.modes() == self.modes_before and screen and self.written.count("\x1b[?25h") > 0


@contextlib.asynccontextmanager
async def terminal(
    gpumesh: Gpumesh,
    *arguments: str,
    columns: int = 120,
    rows: int = 40,
    out: Path | None = None,
    **environment: str,
) -> AsyncIterator[Terminal]:
    """Runs the command on a terminal of its own, and kills it when the context ends first. ``out``: a file for its
    standard output."""
    stack = contextlib.ExitStack()
    controller, command_end = pty.openpty()
    fcntl.ioctl(command_end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    modes = termios.tcgetattr(controller)
    loop = asyncio.get_running_loop()

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C there is a signal to the command

    try:
        process = await asyncio.create_subprocess_exec(
            str(GPUMESH),
            *arguments,
            stdin=command_end,
            stdout=command_end if out is None else stack.enter_context(out.open("wb")),
            stderr=command_end,
            env=gpumesh.environment(**environment),
            cwd=gpumesh.home,
            start_new_session=True,
            preexec_fn=own_terminal,
        )
        made = Terminal(process, controller, modes)

        def read() -> None:
            try:
                made.add_output(os.read(controller, 65536))
            except OSError:  # EIO: no process has the terminal open any more
                loop.remove_reader(controller)

        loop.add_reader(controller, read)
        try:
            yield made
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            loop.remove_reader(controller)
    finally:
        stack.close()
        os.close(controller)
        os.close(command_end)
