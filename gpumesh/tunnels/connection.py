"""What worker.py needs of a transport, in the worker's process: via_sshtunnel.py and via_openssh.py each have a
``connect`` of this kind, and return a ``Connection``. Everything here runs on the worker's event loop."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

from gpumesh.errors import TunnelError
from gpumesh.topology import Target
from gpumesh.tunnels.base import Stream
from gpumesh.tunnels.protocol import Setup, Up


class Events(Protocol):
    """The way back to the supervisor, while a connection is made and after."""

    async def ask(self, text: str, *, echo: bool) -> str | None:
        """Has a person answer; ``None`` when there is none, or they declined. ``text`` is safe to print."""

    def forward_failed(self, target: Target, code: str, message: str) -> None:
        """The host refused to open a channel to ``target`` (see ``protocol.ForwardFailed``)."""

    def peer_refused(self, port: int, uid: int) -> None:
        """A connection to a local port was reset, because another user of this machine made it."""


class RemoteCommand(Protocol):
    """A command that runs on the host."""

    @property
    def exit_status(self) -> int | None:
        """Known after ``read`` has returned ``None``; ``None`` then: the host did not say."""

    async def read(self) -> tuple[Stream, bytes] | None:
        """The next piece of output (at most 32 KiB), hostile as it is; ``None`` when the command has ended.

        Not reading stops the host from sending."""

    async def kill(self) -> None:
        """Ends the command on the host, as far as the host lets us, and closes its channel. May be called twice."""


class Connection(Protocol):
    """An authenticated connection that forwards: from ``connect`` on, clients of the listeners are being served."""

    @property
    def up(self) -> Up: ...

    async def ping(self, timeout_s: float) -> float | None:
        """The round trip in ms of a request that the host answers; ``None``: no answer within ``timeout_s``."""

    async def run(self, command: str) -> RemoteCommand:
        """Starts ``command``, words that are quoted for a POSIX shell. Raises ``ExecError`` when the host gives no
        session."""

    async def wait_lost(self) -> TunnelError:
        """Returns when the connection has died by itself, and why."""

    async def close(self) -> None:
        """Ends everything in order: forwarded connections, commands, the connection; within 2 s."""


class Connect(Protocol):
    """Raises ``TunnelError`` with the true reason. The caller sets no deadline: ``setup.ssh.connect_timeout_s`` is kept
    in here, not counting the time that a person takes to answer. Cancelling it leaves nothing behind."""

    async def __call__(self, setup: Setup, listeners: Sequence[socket.socket], events: Events) -> Connection: ...
