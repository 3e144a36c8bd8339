"""What a transport is to the worker's process: each has a ``connect`` of the kind ``ConnectFunction``, which takes a
``ConnectRequest`` and returns a ``HostConnection``. ``transports.py`` has the transports. Everything here runs on the
worker's event loop."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpumesh.errors import TunnelError
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.base import OutputStream

ANSWER_TIMEOUT_S = 120.0  # for a person who is asked for a password or a passphrase


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """``secrets``: ``password`` and ``passphrase``, each only if the spec names a variable. ``interactive``: the
    supervisor can pass a ``Prompt`` on to a person. ``control_dir``: a 0700 folder for ControlMaster sockets.
    ``share``: connections of all users of this machine are served, not only those of our own and of root; so it is
    where the system does not tell."""

    node: str
    ssh: SshSpec
    targets: tuple[Target, ...]
    secrets: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    interactive: bool = False
    control_dir: str | None = None
    share: bool = False


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    rtt_ms: float | None
    server: str
    cipher: str | None = None


class ConnectionEvents(Protocol):
    """The way back to the supervisor, while a connection is made and after."""

    async def ask_person(self, text: str, *, echo: bool) -> str | None:
        """Has a person answer; ``None`` when there is none, or they declined. ``text`` is safe to print."""

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        """The host refused to open a channel to ``target`` (see ``protocol.ForwardFailed``)."""

    def report_peer_refused(self, port: int, uid: int) -> None:
        """A connection to a local port was reset, because another user of this machine made it."""


class RemoteCommand(Protocol):
    """A command that runs on the host."""

    @property
    def exit_status(self) -> int | None:
        """Known after ``read`` has returned ``None``; ``None`` then: the host did not say."""

    async def read(self) -> tuple[OutputStream, bytes] | None:
        """The next piece of output (at most 32 KiB), hostile as it is; ``None`` when the command has ended.

        Not reading stops the host from sending."""

    async def kill(self) -> None:
        """Ends the command on the host, as far as the host lets us, and closes its channel. May be called twice."""


class HostConnection(Protocol):
    """An authenticated connection that forwards: from ``connect`` on, clients of the listeners are being served."""

    @property
    def info(self) -> ConnectionInfo: ...

    async def ping(self, timeout_s: float) -> float | None:
        """The round trip in ms of a request that the host answers; ``None``: no answer within ``timeout_s``."""

    async def start_command(self, command: str) -> RemoteCommand:
        """Starts ``command``, words that are quoted for a POSIX shell. Raises ``ExecError`` when the host gives no
        session."""

    async def wait_lost(self) -> TunnelError:
        """Returns when the connection has died by itself, and why."""

    async def close(self) -> None:
        """Ends everything in order: forwarded connections, commands, the connection; within 2 s."""


class ConnectFunction(Protocol):
    """Raises ``TunnelError`` with the true reason. The caller sets no deadline: ``setup.ssh.connect_timeout_s`` is kept
    in here, not counting the time that a person takes to answer. Cancelling it leaves nothing behind."""

    async def __call__(
        self, setup: ConnectRequest, listeners: Sequence[socket.socket], events: ConnectionEvents
    ) -> HostConnection: ...
