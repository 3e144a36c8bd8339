"""The keys of the user's SSH agent, and which of them belongs to a key file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import paramiko


class _Agent(paramiko.Agent):
    """paramiko's agent, which also closes its socket when its constructor fails: then another program, which is no
    agent, listens at the socket."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except BaseException:
            self.close()
            raise


@contextlib.contextmanager
def open_agent_keys(*, enabled: bool) -> Iterator[tuple[paramiko.AgentKey, ...]]:
    """Gives the block the keys of the agent; none if there is no agent, if it does not answer as an agent does, or if
    it is not ``enabled``. The keys can sign until the end of the block."""
    agent: _Agent | None = None
    keys: tuple[paramiko.AgentKey, ...] = ()
    if enabled:
        # An agent that refuses, or another program that answers like none.
        with contextlib.suppress(paramiko.SSHException, OSError, ValueError):
            agent = _Agent()
            keys = agent.get_keys()
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
