"""Fixtures of this room."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_OPEN,
)

from gpumesh.topology import Target
from gpumesh.tunnels.forwarder import Forwarder
from gpumesh.tunnels.inprocess.channel_multiplexer import ChannelMultiplexer
from tests.tunnels.inprocess.channel_host import (
    PATIENCE_S,
    TARGET,
    ChannelHost,
    IgnoredEvent,
    ServerPolicy,
    run_in_thread,
)
from tests.tunnels.sshd import Sshd, listener


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd") as sshd:
        yield sshd


@pytest.fixture
async def host() -> AsyncIterator[ChannelHost]:
    here, there = socket.socketpair()
    server, client = paramiko.Transport(there), paramiko.Transport(here)
    server.add_server_key(paramiko.ECDSAKey.generate())
    policy = ServerPolicy()
    forwarder = Forwarder()
    refused: list[tuple[Target, int]] = []
    with listener() as local:
        try:
            await run_in_thread(server.start_server, server=policy, event=IgnoredEvent())  # type: ignore[arg-type]
            await run_in_thread(client.start_client, timeout=PATIENCE_S)
            await run_in_thread(client.auth_none, "me")
            multiplexer = ChannelMultiplexer(client, forwarder, lambda target, reason: refused.append((target, reason)))
            forwarder.listen(local, multiplexer.make_dialer(TARGET))
            forwarder.start()
            yield ChannelHost(server, client, local.getsockname()[1], forwarder, multiplexer, policy, refused)
        finally:
            assert await asyncio.to_thread(forwarder.close)
            for transport in (client, server):
                transport.close()
                await run_in_thread(transport.join, PATIENCE_S)


# -- a host that does not answer, or too late ------------------------------------------------------------------------


@pytest.fixture
def unanswered_opens(host: ChannelHost) -> list[paramiko.Message]:
    """The host keeps the requests for channels to itself: here they are."""
    kept: list[paramiko.Message] = []
    host.server._handler_table[MSG_CHANNEL_OPEN] = kept.append
    return kept
