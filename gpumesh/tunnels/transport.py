"""The interface of a transport (``ConnectFunction``, ``HostConnection``), and the times that all transports share.

A ``ConnectFunction`` takes a ``ConnectRequest`` and returns a ``HostConnection``. transports.py lists the transports.
The shared times: for a person's answer to a question (a passphrase), and for the repetition of a ping. All of this runs
on the event loop of the worker's process.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpumesh.errors import TunnelError
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.known_hosts import KnownHost

ANSWER_TIMEOUT_S = 120.0  # a person has to answer a question within this time, for example for a passphrase

PING_RESEND_S = 0.5
"""A ping without an answer is sent again after this time.

TCP sends a lost packet again only after a pause that doubles each time. At 5 % of lost packets, three packets in a row
are lost once in a few thousand pings, and the answer would come after the host was given up. A packet that follows a
lost packet makes TCP notice the loss within a round trip. So a second ping repairs the loss of the first ping, and the
answer to the second ping repairs the loss of the first answer.
"""


def has_progress(progressed_at: float, timeout_s: float) -> bool:
    """Whether a ping without an answer within ``timeout_s`` is no reason to give the host up: the connection has
    carried bytes in the second half of that time, the last ones at ``progressed_at`` (``time.monotonic``)."""
    return time.monotonic() - progressed_at < timeout_s / 2


@dataclass(frozen=True, slots=True)
class ReverseForward:
    """The host listens at its 127.0.0.1:``remote_port``. Its connections go to 127.0.0.1:``local_port`` of this
    machine."""

    remote_port: int
    local_port: int


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """The data that a worker needs for one connection.

    ``secrets``: pairs of a name and a secret. The names are ``password`` and ``passphrase``; a pair is there only if
    the spec names the environment variable that holds the secret. ``interactive``: the supervisor can pass a ``Prompt``
    on to a person. ``control_dir``: a 0700 folder for ControlMaster sockets; ``None`` except in transport openssh.
    ``share``: connections of all users of this machine are served, not only those of our own user and of root.
    ``share`` is also true where the system does not tell which user made a connection. ``mesh`` is the
    ``Topology.identity`` of the node's mesh, for which its host key is recorded. ``without_session``: transport openssh
    keeps no session of its own, because the host ended the session of the last connection. ``reverse_forwards``: a host
    that does not listen for one of them is an error.
    """

    node: str
    ssh: SshSpec
    targets: tuple[Target, ...]
    secrets: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    interactive: bool = False
    control_dir: str | None = None
    share: bool = False
    mesh: str = ""
    without_session: bool = False
    reverse_forwards: tuple[ReverseForward, ...] = ()

    @property
    def known_host(self) -> KnownHost:
        """The node's host, as known_hosts files name it."""
        return KnownHost(self.ssh.host, self.ssh.port, self.node, self.mesh)


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """Facts about a new connection. ``server``: the host's SSH version; ``rtt_ms``: the round trip, if it is known."""

    rtt_ms: float | None
    server: str
    cipher: str | None = None


class ConnectionEvents(Protocol):
    """Takes a connection's questions and reports, from the start of the connect until the end of the connection."""

    async def ask_person(self, text: str, *, echo: bool) -> str | None:
        """Returns a person's answer to the question ``text``; ``None`` when no person is there, or the person declined.

        ``text`` is safe to print. ``echo``: the answer may be shown while the person types.
        """

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        """Reports that the host opened no channel to ``target``. ``protocol.ForwardFailed`` explains ``code``."""

    def report_peer_refused(self, port: int, uid: int) -> None:
        """Reports that a connection to the local ``port`` was reset, because another user (``uid``) made it."""


class RemoteCommand(Protocol):
    """A command that runs on the host."""

    @property
    def exit_status(self) -> int | None:
        """The command's exit status, after ``read`` has returned ``None``. ``None``: the host did not report it."""

    async def read(self) -> tuple[OutputStream, bytes] | None:
        """The next piece of output (at most 32 KiB, not yet made safe); ``None`` when the command has ended.

        While ``read`` is not called, the host stops sending.
        """

    async def write(self, data: bytes) -> None:
        """Sends ``data`` to the input of a command that was started with ``has_input``. Waits while the host takes no
        more. Data for a command that has ended is dropped."""

    async def kill(self) -> None:
        """Ends the command on the host, as far as the host allows it, and closes its channel. May be called twice."""


class HostConnection(Protocol):
    """An authenticated connection that forwards for the clients of the listeners until ``close``."""

    @property
    def info(self) -> ConnectionInfo: ...

    async def ping(self, timeout_s: float) -> float | None:
        """Sends a request that the host must answer, and returns the round trip in ms; ``None``: no answer within
        ``timeout_s``.

        If bytes have come lately (``has_progress``), the host is alive, and the answer waits behind a bulk transfer
        over a slow link. Then the result is ``timeout_s``, in ms.
        """

    async def start_command(self, command: str, *, has_input: bool = False) -> RemoteCommand:
        """Starts ``command``, an argument list that is quoted for a POSIX shell, on the host.

        ``has_input``: the command reads our input (``RemoteCommand.write``), and ends by itself when its input ends.
        Raises ``SessionRefused`` when the host gives no session. Some transports raise it later, from
        ``RemoteCommand.read``.
        """

    async def wait_lost(self) -> TunnelError:
        """Waits until the connection has ended by itself, and returns the reason."""

    async def close(self) -> None:
        """Ends first the forwarded connections, then the commands, then the connection, all within 2 s."""


class ConnectFunction(Protocol):
    """Connects to the host, and forwards for the clients of ``listeners``. Raises ``TunnelError`` with the true reason.

    The function itself ends after ``setup.ssh.connect_timeout_s``, so the caller sets no deadline. The time that a
    person takes to answer does not count. A cancelled call leaves nothing behind.
    """

    async def __call__(
        self, setup: ConnectRequest, listeners: Sequence[socket.socket], events: ConnectionEvents
    ) -> HostConnection: ...
