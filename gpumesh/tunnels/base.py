"""The interface of a tunnel, as the mesh uses it: ``Tunnel``, and the results of commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpumesh.state import TunnelState
from gpumesh.topology import Target


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A finished command. ``exit_status`` is ``None`` when the host did not say (a signal, a broken connection).

    ``stdout`` and ``stderr`` are as the host sent them: hostile until parsed. ``truncated``: one of them was longer
    than the limit.
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
    """A piece of a running command's output. The last chunk has ``exit_status`` set or ``ended`` true."""

    stream: OutputStream
    data: bytes
    ended: bool = False
    exit_status: int | None = None


class Prompter(Protocol):
    """Passes a host's question on to a person (keyboard-interactive, a key's passphrase)."""

    async def __call__(self, node: str, text: str, *, echo: bool) -> str | None:
        """The answer; ``None`` when nobody is there, or they declined. ``text`` is safe to print."""


class Tunnel(Protocol):
    """One node's supervised route to its host: SSH (in a worker process) or direct.

    ``run`` runs for as long as the tunnel is wanted. Everything else may be called meanwhile, on the same event loop.
    """

    @property
    def state(self) -> TunnelState:
        """The latest snapshot; cheap."""

    @property
    def urls(self) -> Mapping[Target, str]:
        """For each candidate target of the backend the base URL to use on this machine, without a slash at its end.

        The URLs stay the same for the tunnel's life, because local ports are kept over reconnects. They can be used
        while ``state.state`` is ``up``.
        """

    async def run(self) -> None:
        """Opens, watches and reopens until cancelled; then closes everything. Never raises on a host's account."""

    async def wait_up(self) -> None:
        """Returns when the tunnel is up. Raises the last TunnelError as soon as a person must act."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        """Runs a command on the host over the same connection, quoted for a POSIX shell.

        ``shareable``: the command changes nothing there, so the answer that another node of the same machine got a
        moment ago may be used. Raises TunnelDown when the tunnel is not up, and ExecError on a time-out or when the
        host gives no session.
        """

    def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        """As ``exec``, without a deadline, with the output as it comes. Closing the iterator ends the command."""

    def suspect(self, reason: str) -> None:
        """A request through the tunnel failed: the tunnel is checked now, not at the next keepalive."""

    def retry_now(self) -> None:
        """Tries again at once if it waits in backoff or failed. For a person's request."""
