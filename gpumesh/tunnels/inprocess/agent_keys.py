"""The keys of the user's SSH agent, and which of them belongs to a key file."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import paramiko

from gpumesh.config import environment


class _Agent(paramiko.agent.AgentSSH):
    """The agent at a Unix socket. paramiko's own class does not close its socket when it cannot connect, or when
    another program, which is no agent, listens there."""

    def __init__(self, path: Path) -> None:
        """Connects to the agent. Raises OSError, SSHException, or ValueError for an answer that makes no sense."""
        super().__init__()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
            self._connect(connection)  # type: ignore[attr-defined]
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._close()  # type: ignore[attr-defined]


@contextlib.contextmanager
def open_agent_keys(*, enabled: bool) -> Iterator[tuple[paramiko.AgentKey, ...]]:
    """Gives the block the keys of the agent; none if there is no agent, if it does not answer as an agent does, or if
    it is not ``enabled``. The keys can sign until the end of the block."""
    path = environment.ssh_auth_sock() if enabled else None
    agent: _Agent | None = None
    if path is not None:
        with contextlib.suppress(paramiko.SSHException, OSError, ValueError):
            agent = _Agent(path)
    keys = () if agent is None else agent.get_keys()
    for key in keys:
        _use_certificate(key)
    try:
        yield keys
    finally:
        if agent is not None:
            agent.close()


def find_agent_key(keys: Sequence[paramiko.AgentKey], public_key: bytes | None) -> paramiko.AgentKey | None:
    """The key of the agent that belongs to ``public_key``; ``None``: the agent does not have it."""
    return next((key for key in keys if key.blob == public_key), None)


def _use_certificate(key: paramiko.AgentKey) -> None:
    """Makes a certificate of the agent log in as such: paramiko would show the host only the key inside."""
    if key.name.endswith("-cert-v01@openssh.com"):
        key.public_blob = paramiko.pkey.PublicBlob(key.name, key.blob)  # type: ignore[assignment]  # a wrong type there
