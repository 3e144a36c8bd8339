"""``Screen``: the terminal as a screen to draw on, and as a keyboard to read key by key.

The terminal is restored at the end of the context, after an exception, after Ctrl-C, and during Ctrl-Z. After SIGTERM
and SIGHUP the caller must end the context or raise an exception.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TextIO

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"  # the second screen; no cursor, no wrapping
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"  # wrapping and the cursor again; the first screen
# A terminal that supports synchronised updates shows everything between these two at once; other terminals ignore them.
_BEGIN_UPDATE, _END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"

_KEY_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
}


def parse_keys(data: bytes) -> Iterator[str]:
    """Yields the keys that were pressed: ``up``, ``escape`` … or the ASCII character. Skips unknown sequences, blanks
    and all other bytes."""
    while data:
        known_sequence = next((sequence for sequence in _KEY_SEQUENCES if data.startswith(sequence)), None)
        if known_sequence is not None:
            yield _KEY_SEQUENCES[known_sequence]
            data = data[len(known_sequence) :]
        elif data.startswith((b"\x1b[", b"\x1bO")):
            # An unknown sequence. It ends with the first byte from @ to ~, or with the data.
            end = next((index for index in range(2, len(data)) if 0x40 <= data[index] <= 0x7E), len(data) - 1)
            data = data[end + 1 :]
        elif data.startswith(b"\x1b"):
            yield "escape"
            data = data[1:]
        else:
            if 0x20 < data[0] < 0x7F:
                yield chr(data[0])
            data = data[1:]


def diff_screen(old: Sequence[str], new: Sequence[str]) -> str:
    """The text to write so that a screen with the lines ``old`` shows the lines ``new``. Empty when no line differs."""
    parts = []
    for index, line in enumerate(new):
        if index >= len(old) or old[index] != line:
            parts.append(f"\x1b[{index + 1};1H\x1b[K{line}\x1b[0m")  # go to the line, clear it, write it, end its style
    if len(new) < len(old):
        parts.append(f"\x1b[{len(new) + 1};1H\x1b[J")  # clear all lines below the last new line
    if not parts:
        return ""
    return _BEGIN_UPDATE + "".join(parts) + _END_UPDATE


class Screen:
    """The screen inside ``with``. The event loop calls ``on_key`` for each key, and ``on_change`` when the size has
    changed or the program has come back from Ctrl-Z. Without ``on_key``, or if stdin is no terminal, no key is
    read."""

    def __init__(self, out: TextIO, *, on_key: Callable[[str], None] | None, on_change: Callable[[], None]) -> None:
        self._out = out
        self._on_key = on_key if sys.stdin is not None and sys.stdin.isatty() else None
        self._on_change = on_change
        self._shown: list[str] = []  # the lines that the terminal shows now
        self._saved_modes: Any = None  # the terminal's modes before keys were read
        self._loop = asyncio.get_running_loop()

    @property
    def reads_keys(self) -> bool:
        """Whether ``on_key`` is called for keys."""
        return self._on_key is not None

    def __repr__(self) -> str:
        keys = "keys" if self.reads_keys else "no keys"
        return f"<Screen {keys} {len(self._shown)} lines>"

    def __enter__(self) -> Screen:
        try:
            self._enter()
            self._loop.add_signal_handler(signal.SIGWINCH, self._handle_resize)
            self._loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        except BaseException:  # whatever it is, the terminal must not stay changed
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGWINCH, signal.SIGTSTP):
            self._loop.remove_signal_handler(number)
        self._leave()

    def draw(self, lines: Sequence[str]) -> None:
        """Shows these lines from the top. There may be no more lines than the screen is high."""
        update = diff_screen(self._shown, lines)
        if update:
            self._out.write(update)
            self._out.flush()
        self._shown = list(lines)

    def _enter(self) -> None:
        """Switches to the second screen of the terminal, which is empty, and to reading key by key."""
        if self._on_key is not None:
            import termios
            import tty

            descriptor = sys.stdin.fileno()
            self._saved_modes = termios.tcgetattr(descriptor)
            tty.setcbreak(descriptor)  # signals stay on: Ctrl-C and Ctrl-Z work as usual
            self._loop.add_reader(descriptor, self._read_keys)
        self._shown = []
        self._out.write(_ENTER)
        self._out.flush()

    def _leave(self) -> None:
        """Switches back to the first screen, and to the usual keyboard. May be called twice."""
        try:
            with suppress(OSError):  # the terminal itself is gone
                self._out.write(_LEAVE)
                self._out.flush()
        finally:
            self._release_keys()

    def _release_keys(self) -> None:
        """Ends the reading of keys, and restores the modes that the terminal had before."""
        if self._saved_modes is None:
            return
        import termios

        descriptor = sys.stdin.fileno()
        self._loop.remove_reader(descriptor)
        modes, self._saved_modes = self._saved_modes, None
        with suppress(termios.error):  # the terminal itself is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, modes)

    def _read_keys(self) -> None:
        """Calls ``on_key`` for each key that was pressed. The event loop calls this when stdin is readable."""
        try:
            data = os.read(sys.stdin.fileno(), 4096)  # more than a person types at once
        except OSError:  # EIO: the terminal is gone
            data = b""
        if not data:
            # The terminal is gone. Its descriptor would stay readable for ever, and we would be called for ever.
            self._loop.remove_reader(sys.stdin.fileno())
            return
        assert self._on_key is not None, "keys are read without on_key"
        for key in parse_keys(data):
            self._on_key(key)

    def _handle_resize(self) -> None:
        """Clears the screen, so that the next ``draw`` writes every line in the new size."""
        self._shown = []
        self._out.write("\x1b[2J")
        self._on_change()

    def _suspend(self) -> None:
        """Stops the program after Ctrl-Z, with the terminal restored, until a person continues it."""
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()  # SIGCONT continues here
        self._on_change()
