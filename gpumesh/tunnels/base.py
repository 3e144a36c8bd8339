"""The interface of a tunnel for the mesh: ``Tunnel``, and the results of commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpumesh.state import TunnelState
from gpumesh.topology import Target

PROGRAM_END_S = 5.0  # the time for a program to end by itself after the end of its input


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A finished command. ``exit_status`` is ``None`` when the host did not report it (a signal, a broken connection).

    ``stdout`` and ``stderr`` hold the bytes that the host sent: hostile until parsed. ``truncated``: at least one of
    the two was longer than the limit.
    """

    exit_status: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class OutputStream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class ExecChunk:
    """A piece of a running command's output. The last chunk has ``ended`` true and holds the command's ``exit_status``.

    ``exit_status`` is ``None`` in all other chunks, and in the last one when the host did not report the status.
    """

    stream: OutputStream
    data: bytes
    ended: bool = False
    exit_status: int | None = None


class Prompter(Protocol):
    """Passes a host's question on to a person (keyboard-interactive, a key's passphrase)."""

    async def __call__(self, node: str, text: str, *, echo: bool) -> str | None:
        """Returns the person's answer; ``None`` when no person is there, or the person declined.

        ``text``, the question, is safe to print. ``echo``: the answer may be shown while the person types.
        """


class ShellStream(Protocol):
    """The input and the output of a shell on a host (remote_shell.py). One task at a time may use it."""

    async def write(self, data: bytes) -> None:
        """Sends ``data`` to the shell's input. Returns when the data is on its way. Raises TunnelDown."""

    async def read(self) -> ExecChunk:
        """Waits for the next piece of output. The piece with ``ended`` true is the last one. A cancelled call loses
        nothing.

        Raises ExecError when the host gives no session, or when the shell was cut off.
        """

    async def close(self) -> None:
        """Ends the shell and the command line that it runs. May be called twice."""


class ProgramStream(ShellStream, Protocol):
    """The input and the output of a program that ``Tunnel.open_program`` has started. One task may read while another
    one writes.

    Output that is not read stops the program: at most 2 MiB of it wait in our memory. ``write`` returns when the
    program's host has taken the data; data for a program that has ended is dropped. ``close`` ends the program's input,
    so that it ends by itself (``Tunnel.open_program``). A program on this machine has ended when ``close`` returns.
    """


class Tunnel(Protocol):
    """One node's supervised route to its host: SSH (in a worker process) or direct.

    ``run`` runs for as long as the tunnel is wanted. All other methods may be called meanwhile, on the same event loop.
    """

    @property
    def state(self) -> TunnelState:
        """The latest snapshot of the tunnel's state. Cheap: nothing is asked or measured."""

    @property
    def urls(self) -> Mapping[Target, str]:
        """The base URL on this machine for each candidate target of the backend, without a slash at its end.

        The URLs stay the same for the tunnel's life, because the local ports stay open during a reconnect. A URL can be
        used while ``state.state`` is ``up``.
        """

    async def run(self) -> None:
        """Opens, watches and reopens the tunnel until cancelled, then closes everything. No error of a host ends it: a
        host's errors are in ``state``."""

    async def wait_up(self) -> None:
        """Returns when the tunnel is up. Raises TunnelDown when the tunnel is closed.

        When only a person can mend the cause of the last failure, waiting may never end, so the TunnelError of that
        failure is raised.
        """

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        """Runs a command on the host, over the tunnel's connection, and returns its exit status and its output.

        ``argv`` is an argument list; it is quoted for a POSIX shell. ``limit_bytes`` limits stdout and stderr, each
        alone. ``shareable``: the command changes nothing on the host, so the result may be a result that another node
        of the same machine got a moment ago. Raises TunnelDown when the tunnel is not up, and ExecError on a time-out
        or when the host gives no session.
        """

    def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        """Runs a command as ``exec`` does, but without a deadline, and yields each piece of its output as it comes.

        Closing the iterator ends the command. Raises as ``exec``.
        """

    async def open_shell(self) -> ShellStream | None:
        """Starts a shell on the host that runs one command line after another (remote_shell.py).

        Returns before the shell is ready, and before it is known whether the host gives a session. ``None``: commands
        run on this machine without a session, so ``exec`` is just as good. Raises TunnelDown when the tunnel is not up.
        """

    async def open_program(self, argv: Sequence[str]) -> ProgramStream:
        """Starts a program that reads our input, on the host, or on this machine for a node without SSH.

        The program must end by itself, and end its own children, when its input ends: after ``close``, when the
        connection ends, and when our process is killed. sshd would let it run on, so no other end is sure. Its output
        is closed then, and whatever it prints may end it (SIGPIPE) before it has ended its children. On this
        machine, what is left of its process group is killed ``PROGRAM_END_S`` seconds after ``close``.

        ``argv`` is an argument list; it is quoted for a POSIX shell. So that csh as the login shell can start it, it
        should have no line break. Returns before it is known whether the host gives a session: then ``read`` raises
        ExecError. Raises TunnelDown when an SSH tunnel is not up. A node without SSH need not be up: the program
        may be its server. Raises ExecError when that node is not on this machine, or the program cannot be started.
        """

    def suspect(self, reason: str) -> None:
        """Checks the tunnel now, not at the next keepalive, because a request through it failed.

        ``reason``: how the request failed. It has no effect on the check.
        """

    def retry_now(self) -> None:
        """Connects at once if the tunnel is in phase backoff or failed, or held closed. Called when a person asks for
        it."""

    def held_closed(self) -> AbstractContextManager[None]:
        """Cuts the connection as a crash would, and keeps the tunnel closed during the block; then it connects at once.

        Raises TunnelDown when the tunnel is not up, or is held already, and UsageError when it has no connection to
        cut, because the node has no SSH.
        """


class ClosableTunnel(Tunnel, Protocol):
    """A tunnel that was just made."""

    def close(self) -> None:
        """Releases the local ends of a tunnel that never ran."""
