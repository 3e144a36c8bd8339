"""What the mesh sees of a tunnel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpumesh.state import TunnelState
from gpumesh.topology import Target


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A finished command. ``exit_status`` is ``None`` when the host did not say (killed by a signal, cut).

    ``stdout`` and ``stderr`` are as the host sent them: hostile until parsed. ``truncated``: either passed the bound.
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
    """A piece of a running command's output; the last one has ``exit_status`` set or ``ended`` true."""

    stream: OutputStream
    data: bytes
    ended: bool = False
    exit_status: int | None = None


class Prompter(Protocol):
    """Passes a host's question on to a person (keyboard-interactive, a key's passphrase)."""

    async def __call__(self, node: str, text: str, *, echo: bool) -> str | None:
        """The answer; ``None`` when there is nobody, or they declined. ``text`` is safe to print."""


class Tunnel(Protocol):
    """One node's supervised way to its host: SSH (in a worker process) or direct.

    ``run`` lives as long as the tunnel should; all else may be called while it runs, on the same event loop.
    """

    @property
    def state(self) -> TunnelState:
        """The latest snapshot; cheap."""

    @property
    def urls(self) -> Mapping[Target, str]:
        """For each candidate target of the backend the base URL to use here, without a slash at its end.

        Constant for the tunnel's life (local ports are kept over reconnects); usable while ``state.state`` is ``up``.
        """

    async def run(self) -> None:
        """Opens, watches and reopens until cancelled; then closes everything. Never raises on a host's account."""

    async def wait_up(self) -> None:
        """Returns when the tunnel is up. Raises the last TunnelError as soon as it is known that a person must act."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        """Runs a command on the host over the same connection, quoted for a POSIX shell. A ``shareable`` changes
        nothing there: what another node of the same machine was answered a moment ago will do.

        Raises TunnelDown when the tunnel is not up and ExecError on time-out or when the host gives no session.
        """

    def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        """As ``exec``, without a deadline, output as it comes; closing the iterator ends the remote command."""

    def suspect(self, reason: str) -> None:
        """A request through the tunnel failed: check it at once rather than at the next keepalive."""

    def retry_now(self) -> None:
        """Try again at once if waiting in backoff or failed (a person asked, the network changed)."""
