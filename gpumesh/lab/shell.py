"""The shell of the simulated host's SSH server: an interpreter of a few commands. It never executes a client's text.
The answer to an unknown command is ``not found``, status 127.

It understands words with the quotes of a POSIX shell; ``;``, newlines, ``&&``, ``||``; ``NAME=value``, ``export``;
``2>&1``; ``$?``; ``sh -c TEXT``, ``exec COMMAND``. Probes and people send these. It also recognizes the script under
which a tunnel runs a command (tunnels/remote_command.py), and does what this script does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from gpumesh.lab import nvidia_smi
from gpumesh.lab.engine import GpuLoad
from gpumesh.lab.profile import Faults, HostProfile, SmiMode
from gpumesh.tunnels.remote_command import unwrap_killable

MAX_COMMAND = 1 << 16  # characters
MAX_DEPTH = 8  # of ``sh -c`` inside of ``sh -c``
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_STATUS = "\0"  # stands for ``$?`` in a word
_REDIRECTS = ("2>&1", "2>/dev/null")
_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+)|(?P<joint>&&|\|\||;|\n)|(?P<redirect>2>&1|2>/dev/null)|(?P<single>'[^']*')"""
    r"""|(?P<double>"(?:[^"\\]|\\.)*")|(?P<escape>\\.)|(?P<status>\$\?)|(?P<wrong>['"&|<>()`\\])"""
    r"""|(?P<plain>[^ \t\r\n;&|<>()`'"\\$]+|\$)""",
    re.DOTALL,
)


class StandardStreams(Protocol):
    """A command's standard streams."""

    async def read(self) -> bytes:
        """The next bytes from the client; empty at their end."""
        ...

    async def write(self, data: bytes, *, error: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class SimShell:
    """The shell of one host. ``load`` and ``faults`` are called for each command."""

    profile: HostProfile
    load: Callable[[], GpuLoad]
    faults: Callable[[], Faults]

    async def run(self, text: str, terminal: StandardStreams, depth: int = 0) -> int:
        """Runs the commands in ``text``. Returns the exit status of the last one, as ``sh -c text`` does."""
        if len(text) > MAX_COMMAND or depth > MAX_DEPTH:
            await terminal.write(b"sh: Argument list too long\n", error=True)
            return 126
        try:
            commands = _split(text)
        except ValueError as error:
            await terminal.write(f"sh: 1: Syntax error: {error}\n".encode(), error=True)
            return 2
        status = 0
        for joint, words in commands:
            if (joint == "&&" and status != 0) or (joint == "||" and status == 0):
                continue
            streams = _MergedStreams(terminal) if "2>&1" in words else terminal
            argv = [word.replace(_STATUS, str(status)) for word in words if word not in _REDIRECTS]
            while argv and _ASSIGNMENT.match(argv[0]):
                del argv[0]
            if argv and argv[0] == "exit":
                return int(argv[1]) & 0xFF if len(argv) > 1 and argv[1].isdigit() else status
            status = await self._run_command(argv, streams, depth) if argv else 0
        return status

    async def _run_command(self, argv: list[str], terminal: StandardStreams, depth: int) -> int:
        name, *rest = argv
        name = name.rsplit("/", 1)[-1]
        if name in ("sh", "bash", "dash") and len(rest) >= 2 and rest[0] in ("-c", "-lc"):
            inner = unwrap_killable(rest[1])
            if inner is not None:
                return await self._run_until_input_ends(inner, terminal, depth + 1)
            return await self.run(rest[1], terminal, depth + 1)
        if name in ("exec", "command", "env", "nice", "timeout") and rest:
            if name == "command" and rest[0] == "-v":
                is_known = rest[1:] and (rest[1] in _KNOWN or rest[1] == "nvidia-smi")
                await terminal.write(f"/usr/bin/{rest[1]}\n".encode() if is_known else b"")
                return 0 if is_known else 127
            return await self._run_command(rest[1:] if name == "timeout" and rest[1:] else rest, terminal, depth)
        if name == "nvidia-smi":
            return await self._nvidia_smi(rest, terminal)
        command = _KNOWN.get(name)
        if command is None:
            await terminal.write(f"sh: 1: {name[:80]}: not found\n".encode(errors="replace"), error=True)
            return 127
        return await command(self, rest, terminal)

    async def _run_until_input_ends(self, command: str, terminal: StandardStreams, depth: int) -> int:
        """Does what the script of tunnels/remote_command.py does on a real host: the command is killed when its
        standard input ends."""

        async def read_to_the_end() -> None:
            while await terminal.read():
                pass

        command_task = asyncio.ensure_future(self.run(command, _NoInput(terminal), depth))
        input_task = asyncio.ensure_future(read_to_the_end())
        try:
            await asyncio.wait((command_task, input_task), return_when=asyncio.FIRST_COMPLETED)
            return command_task.result() if command_task.done() else 128 + 9  # the status after SIGKILL
        finally:
            for task in (command_task, input_task):
                task.cancel()
            await asyncio.gather(command_task, input_task, return_exceptions=True)

    async def _nvidia_smi(self, argv: list[str], terminal: StandardStreams) -> int:
        faults = self.faults()
        if faults.nvidia_smi is SmiMode.HANG:
            await asyncio.Event().wait()
        if faults.nvidia_smi_delay_s > 0:
            await asyncio.sleep(faults.nvidia_smi_delay_s)
        status, output = nvidia_smi.run_nvidia_smi(argv, self.profile, self.load(), faults.nvidia_smi)
        await terminal.write(output, error=status == 127)
        return status


class _NoInput:
    """The streams of a command with ``</dev/null``."""

    def __init__(self, terminal: StandardStreams) -> None:
        self._terminal = terminal

    async def read(self) -> bytes:
        return b""

    async def write(self, data: bytes, *, error: bool = False) -> None:
        await self._terminal.write(data, error=error)


class _MergedStreams:
    """The streams of a command with ``2>&1``."""

    def __init__(self, terminal: StandardStreams) -> None:
        self._terminal = terminal

    async def read(self) -> bytes:
        return await self._terminal.read()

    async def write(self, data: bytes, *, error: bool = False) -> None:
        del error
        await self._terminal.write(data)


def _split(text: str) -> list[tuple[str, list[str]]]:
    """The commands. Each has the operator before it (``;``, ``&&`` or ``||``) and its words.

    Raises ``ValueError`` for an open quote, and for syntax that is not simulated.
    """
    commands: list[tuple[str, list[str]]] = [(";", [])]
    word: str | None = None
    for match in _TOKEN.finditer(text.replace("\0", "")):
        kind, part = match.lastgroup, match.group()
        if kind in ("blank", "joint"):
            if word is not None:
                commands[-1][1].append(word)
                word = None
            if kind == "joint":
                commands.append((part if part in ("&&", "||") else ";", []))
            continue
        if kind == "wrong":
            raise ValueError(f"{part!r} unexpected")
        if kind == "single":
            part = part[1:-1]
        elif kind == "double":
            part = re.sub(r'\\([\\"$`])', r"\1", part[1:-1].replace("$?", _STATUS))
        elif kind == "escape":
            part = part[1:]
        elif kind == "status":
            part = _STATUS
        word = (word or "") + part
    if word is not None:
        commands[-1][1].append(word)
    return [(joint, words) for joint, words in commands if words]


ShellCommand = Callable[[SimShell, list[str], StandardStreams], Awaitable[int]]


async def _hostname(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    del argv
    await terminal.write(f"{shell.profile.hostname}\n".encode())
    return 0


async def _uname(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    system = f"Linux {shell.profile.hostname} 6.8.0-lab #1 SMP simulated x86_64 GNU/Linux"
    await terminal.write(f"{system if '-a' in argv else 'Linux'}\n".encode())
    return 0


async def _whoami(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    del argv
    await terminal.write(f"{shell.profile.user}\n".encode())
    return 0


async def _echo(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    del shell
    newline = argv[:1] != ["-n"]
    await terminal.write((" ".join(argv if newline else argv[1:]) + "\n" * newline).encode(errors="replace"))
    return 0


async def _cat(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    """Copies standard input. The host has no files."""
    del shell
    if argv and argv != ["-"]:
        await terminal.write(f"cat: {argv[0][:80]}: No such file or directory\n".encode(errors="replace"), error=True)
        return 1
    while data := await terminal.read():
        await terminal.write(data)
    return 0


async def _sleep(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    del shell
    if argv == ["infinity"]:
        await asyncio.Event().wait()
    try:
        await asyncio.sleep(min(float(argv[0]), 86400.0))
    except (IndexError, ValueError):
        await terminal.write(b"sleep: invalid time interval\n", error=True)
        return 1
    return 0


async def _seq(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    """``seq N``, for an output of a known size."""
    del shell
    if len(argv) != 1 or not argv[0].isdigit():
        await terminal.write(b"seq: one number, here\n", error=True)
        return 1
    last, step = min(int(argv[0]), 10_000_000), 4096
    for start in range(1, last + 1, step):
        numbers = range(start, min(start + step, last + 1))
        await terminal.write("".join(f"{number}\n" for number in numbers).encode())
    return 0


async def _test(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    """Compares texts. Tests for files are always false: the host has no files."""
    del shell, terminal
    words = argv[:-1] if argv[-1:] == ["]"] else argv
    if len(words) == 3 and words[1] in ("=", "==", "!="):
        return int((words[0] == words[2]) is (words[1] == "!="))
    return int(not (len(words) == 1 and words[0]))


async def _true(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    del shell, argv, terminal
    return 0


async def _false(shell: SimShell, argv: list[str], terminal: StandardStreams) -> int:
    del shell, argv, terminal
    return 1


_KNOWN: dict[str, ShellCommand] = {
    "hostname": _hostname,
    "uname": _uname,
    "whoami": _whoami,
    "echo": _echo,
    "cat": _cat,
    "sleep": _sleep,
    "seq": _seq,
    "test": _test,
    "[": _test,
    "true": _true,
    ":": _true,
    "export": _true,
    "set": _true,
    "false": _false,
}
