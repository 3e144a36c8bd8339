"""The shell of a simulated host: interprets a few commands of a POSIX shell, and never executes a client's text.

The answer to an unknown command is ``not found``, status 127. The shell understands what probes and people send: words
with quotes; ``;``, newlines, ``&&``, ``||``; ``NAME=value``, ``export``; ``2>&1``; ``$?``; ``sh -c TEXT``,
``exec COMMAND``. It also recognizes the scripts under which a tunnel runs commands (tunnels/remote_command.py and
tunnels/remote_shell.py), and does what these scripts do.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from gpumesh.lab import nvidia_smi
from gpumesh.lab.inference.usage import GpuLoad
from gpumesh.lab.profile import Faults, HostProfile, SmiMode
from gpumesh.text.lines import LineBuffer
from gpumesh.tunnels.remote_commands.remote_command import unwrap_killable
from gpumesh.tunnels.remote_commands.remote_shell import KILL_LINE, READY_LINE, is_shell_script

MAX_COMMAND = 1 << 16  # characters of a command line
MAX_DEPTH = 8  # of ``sh -c`` inside of ``sh -c``
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_STATUS = "\0"  # stands for ``$?`` in a word, until the command before has its exit status
_REDIRECTS = ("2>&1", "2>/dev/null")
_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+)|(?P<operator>&&|\|\||;|\n)|(?P<redirect>2>&1|2>/dev/null)|(?P<single_quoted>'[^']*')"""
    r"""|(?P<double_quoted>"(?:[^"\\]|\\.)*")|(?P<escape>\\.)|(?P<status>\$\?)|(?P<unsupported>['"&|<>()`\\])"""
    r"""|(?P<plain>[^ \t\r\n;&|<>()`'"\\$]+|\$)""",
    re.DOTALL,
)
SSH_PORT = 22
KILLED_STATUS = 128 + 9  # a shell's exit status for a command that SIGKILL (9) has ended
_SHELLS = ("sh", "bash", "dash")
_WRAPPERS = ("exec", "command", "env", "nice", "timeout")  # programs that run the command in their arguments


class StandardStreams(Protocol):
    """A command's standard input, output and error."""

    async def read(self) -> bytes:
        """The next bytes from the client; empty at their end."""
        ...

    async def write(self, data: bytes, *, error: bool = False) -> None:
        """Writes to standard output, or to standard error if ``error``."""
        ...


@dataclass(frozen=True, slots=True)
class SimShell:
    """The shell of one host. ``load`` and ``faults`` are called for each nvidia-smi. ``ports``: beside SSH's."""

    profile: HostProfile
    load: Callable[[], GpuLoad]
    faults: Callable[[], Faults]
    ports: Mapping[int, int] = field(default_factory=dict)

    async def run(self, text: str, streams: StandardStreams, depth: int = 0) -> int:
        """Runs the commands in ``text``. Returns the exit status of the last one, as ``sh -c text`` does.

        ``depth`` is the number of shells around this one. The exit statuses for errors of the shell itself are those of
        ``sh``: 126 (cannot run the command), 127 (no such command), 2 (a syntax error).
        """
        if len(text) > MAX_COMMAND or depth > MAX_DEPTH:
            await streams.write(b"sh: Argument list too long\n", error=True)
            return 126
        try:
            commands = _split_commands(text)
        except ValueError as error:
            await streams.write(f"sh: 1: Syntax error: {error}\n".encode(), error=True)
            return 2
        status = 0
        for operator, words in commands:
            failed_before_and = operator == "&&" and status != 0
            succeeded_before_or = operator == "||" and status == 0
            if failed_before_and or succeeded_before_or:
                continue
            argv = [word.replace(_STATUS, str(status)) for word in words if word not in _REDIRECTS]
            while argv and _ASSIGNMENT.match(argv[0]):  # NAME=value before a command has no effect here
                del argv[0]
            if argv and argv[0] == "exit":
                has_status = len(argv) > 1 and argv[1].isdigit()
                return int(argv[1]) & 0xFF if has_status else status  # an exit status has 8 bits
            if argv:
                command_streams = _MergedStreams(streams) if "2>&1" in words else streams
                status = await self._run_command(argv, command_streams, depth)
            else:
                status = 0  # only assignments
        return status

    async def _run_command(self, argv: list[str], streams: StandardStreams, depth: int) -> int:
        """Runs one command and returns its exit status. ``argv`` is the command's name, or path, and its arguments.

        A command that runs another one (``sh -c``, ``exec``, ``timeout`` …) has the exit status of the other.
        """
        path, *arguments = argv
        name = path.rsplit("/", 1)[-1]
        is_shell_with_text = name in _SHELLS and len(arguments) >= 2 and arguments[0] in ("-c", "-lc")
        if is_shell_with_text:
            text = arguments[1]
            if is_shell_script(text):
                return await self._run_input_lines(streams, depth + 1)
            killable_command = unwrap_killable(text)
            if killable_command is not None:
                return await self._run_until_input_ends(killable_command, streams, depth + 1)
            return await self.run(text, streams, depth + 1)
        if name == "command" and arguments[:1] == ["-v"]:
            return await self._find_command(arguments[1:], streams)
        if name in _WRAPPERS and arguments:
            # The first argument of ``timeout`` is the duration, which does not matter here.
            inner_argv = arguments[1:] if name == "timeout" and len(arguments) > 1 else arguments
            return await self._run_command(inner_argv, streams, depth)
        if name == "nvidia-smi":
            return await self._nvidia_smi(arguments, streams)
        command = _COMMANDS.get(name)
        if command is None:
            await streams.write(f"sh: 1: {name[:80]}: not found\n".encode(errors="replace"), error=True)
            return 127
        return await command(self, arguments, streams)

    async def _find_command(self, names: list[str], streams: StandardStreams) -> int:
        """Runs ``command -v NAME``: writes the path of a known command, or returns status 127."""
        name = names[0] if names else ""
        is_known = name in _COMMANDS or name == "nvidia-smi"
        if not is_known:
            return 127
        await streams.write(f"/usr/bin/{name}\n".encode())
        return 0

    async def _run_until_input_ends(self, command: str, streams: StandardStreams, depth: int) -> int:
        """Runs the command, and kills it when standard input ends. Returns the exit status.

        On a real host, the script of tunnels/remote_command.py does this.
        """

        async def read_to_the_end() -> None:
            while await streams.read():
                pass

        command_task = asyncio.ensure_future(self.run(command, _NoInput(streams), depth))
        input_task = asyncio.ensure_future(read_to_the_end())
        try:
            await asyncio.wait((command_task, input_task), return_when=asyncio.FIRST_COMPLETED)
            return command_task.result() if command_task.done() else KILLED_STATUS
        finally:
            for task in (command_task, input_task):
                task.cancel()
            await asyncio.gather(command_task, input_task, return_exceptions=True)

    async def _run_input_lines(self, streams: StandardStreams, depth: int) -> int:
        """Runs each line of standard input as a command line, until the input ends. Returns the exit status.

        On a real host, the script of tunnels/remote_shell.py does this.
        """
        buffer = LineBuffer(MAX_COMMAND, cut=True)
        running: asyncio.Future[int] | None = None
        await streams.write(READY_LINE + b"\n")
        try:
            while data := await streams.read():
                for line in buffer.feed(data):
                    if line.strip() and line != KILL_LINE.strip():
                        running = asyncio.ensure_future(
                            self.run(line.decode(errors="replace"), _NoInput(streams), depth)
                        )
                        continue
                    await _end_task(running, kill=line == KILL_LINE.strip())
                    running = None
                    await streams.write(READY_LINE + b"\n")
            return 0
        finally:
            await _end_task(running, kill=True)

    async def _nvidia_smi(self, arguments: list[str], streams: StandardStreams) -> int:
        """Runs nvidia-smi as the faults say. Returns the exit status."""
        faults = self.faults()
        if faults.nvidia_smi is SmiMode.HANG:
            await asyncio.Event().wait()  # until the client closes the channel
        if faults.nvidia_smi_delay_s > 0:
            await asyncio.sleep(faults.nvidia_smi_delay_s)
        status, output = nvidia_smi.run_nvidia_smi(arguments, self.profile, self.load(), faults.nvidia_smi)
        is_not_found = status == 127
        await streams.write(output, error=is_not_found)  # the message "not found" is the shell's, on standard error
        return status


async def _end_task(task: asyncio.Future[int] | None, *, kill: bool) -> None:
    """Waits for the end of a command line; with ``kill``, cancels it first."""
    if task is None:
        return
    if kill:
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _NoInput:
    """The streams of a command with ``</dev/null``: standard input is empty."""

    def __init__(self, streams: StandardStreams) -> None:
        self._streams = streams

    async def read(self) -> bytes:
        return b""

    async def write(self, data: bytes, *, error: bool = False) -> None:
        await self._streams.write(data, error=error)


class _MergedStreams:
    """The streams of a command with ``2>&1``: standard error goes to standard output."""

    def __init__(self, streams: StandardStreams) -> None:
        self._streams = streams

    async def read(self) -> bytes:
        return await self._streams.read()

    async def write(self, data: bytes, *, error: bool = False) -> None:
        del error
        await self._streams.write(data)


class _Command(NamedTuple):
    """One command of a line. ``operator`` is the operator before it: ``;`` (also for a newline), ``&&`` or ``||``."""

    operator: str
    words: list[str]


def _split_commands(text: str) -> list[_Command]:
    """Splits a line into its commands, and removes the quotes. A command without words is left out.

    Raises ``ValueError`` for an open quote, and for syntax that is not simulated.
    """
    commands = [_Command(";", [])]
    word: str | None = None  # the word so far: several parts without a blank between them are one word, as in a"b c"
    for match in _TOKEN.finditer(text.replace(_STATUS, "")):  # the client's own NUL must not be taken for ``$?``
        kind, part = match.lastgroup, match.group()
        if kind in ("blank", "operator"):
            if word is not None:
                commands[-1].words.append(word)
                word = None
            if kind == "operator":
                commands.append(_Command(";" if part == "\n" else part, []))
        else:  # a part of a word
            word = (word or "") + _unquote(kind, part)
    if word is not None:
        commands[-1].words.append(word)
    return [command for command in commands if command.words]


def _unquote(kind: str | None, part: str) -> str:
    """The text that a part of a word means. ``kind`` is the group of ``_TOKEN`` that has matched the part.

    Raises ``ValueError`` for syntax that is not simulated.
    """
    match kind:
        case "unsupported":
            raise ValueError(f"{part!r} unexpected")
        case "single_quoted":
            return part[1:-1]
        case "double_quoted":
            # Between double quotes, a backslash counts only before one of these four characters.
            return re.sub(r'\\([\\"$`])', r"\1", part[1:-1].replace("$?", _STATUS))
        case "escape":
            return part.removeprefix("\\")
        case "status":
            return _STATUS
    return part


ShellCommand = Callable[[SimShell, list[str], StandardStreams], Awaitable[int]]
"""Runs a command with its arguments, and returns the exit status."""


async def _hostname(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Writes the host's name, which shows that the host is simulated."""
    del arguments
    await streams.write(f"{shell.profile.hostname}\n".encode())
    return 0


async def _uname(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Writes the system's name; with ``-a`` also the host's name, kernel and machine."""
    full_name = f"Linux {shell.profile.hostname} 6.8.0-lab #1 SMP simulated x86_64 GNU/Linux"
    output = full_name if "-a" in arguments else "Linux"
    await streams.write(f"{output}\n".encode())
    return 0


async def _whoami(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    del arguments
    await streams.write(f"{shell.profile.user}\n".encode())
    return 0


async def _echo(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Writes its arguments and a newline; with ``-n`` no newline."""
    del shell
    output = " ".join(arguments[1:]) if arguments[:1] == ["-n"] else " ".join(arguments) + "\n"
    await streams.write(output.encode(errors="replace"))
    return 0


async def _cat(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Copies standard input to standard output. A file's name is an error: the host has no files."""
    del shell
    if arguments and arguments != ["-"]:
        message = f"cat: {arguments[0][:80]}: No such file or directory\n"
        await streams.write(message.encode(errors="replace"), error=True)
        return 1
    while data := await streams.read():
        await streams.write(data)
    return 0


async def _grep(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Writes the kernel's lines of the listening sockets if it is asked for files of /proc/net."""
    if not any(argument.startswith("/proc/net/tcp") for argument in arguments):
        await streams.write(b"grep: No such file or directory\n", error=True)
        return 2
    for number, port in enumerate([SSH_PORT] if shell.faults().refuse else [SSH_PORT, *shell.ports]):
        # This end, the other end, the state of a listener; the rest does not matter.
        await streams.write(f"{number:4}: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:0\n".encode())
    return 0


async def _sleep(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Waits for the seconds of its argument, at most a day, or for ever with ``infinity``."""
    del shell
    if arguments == ["infinity"]:
        await asyncio.Event().wait()  # until the command is cancelled
    try:
        await asyncio.sleep(min(float(arguments[0]), 86400.0))
    except (IndexError, ValueError):  # no argument, or no number
        await streams.write(b"sleep: invalid time interval\n", error=True)
        return 1
    return 0


async def _seq(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Writes the numbers from 1 to the argument, one a line: an output whose size the client can choose."""
    del shell
    if len(arguments) != 1 or not arguments[0].isdigit():
        await streams.write(b"seq: one number, here\n", error=True)
        return 1
    last_number, batch_size = min(int(arguments[0]), 10_000_000), 4096
    for start in range(1, last_number + 1, batch_size):
        numbers = range(start, min(start + batch_size, last_number + 1))
        await streams.write("".join(f"{number}\n" for number in numbers).encode())
    return 0


async def _test(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    """Compares two texts, or tests that a text is not empty. Tests for files are always false: there are no files.

    Returns 0 for true and 1 for false. The name of this command is ``test``, or ``[`` with ``]`` as its last argument.
    """
    del shell, streams
    words = arguments[:-1] if arguments[-1:] == ["]"] else arguments
    is_true = len(words) == 1 and words[0] != ""
    if len(words) == 3:
        left, operator, right = words
        if operator in ("=", "=="):
            is_true = left == right
        elif operator == "!=":
            is_true = left != right
    return 0 if is_true else 1


async def _true(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    del shell, arguments, streams
    return 0


async def _false(shell: SimShell, arguments: list[str], streams: StandardStreams) -> int:
    del shell, arguments, streams
    return 1


_COMMANDS: dict[str, ShellCommand] = {
    "hostname": _hostname,
    "uname": _uname,
    "whoami": _whoami,
    "echo": _echo,
    "cat": _cat,
    "grep": _grep,
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
