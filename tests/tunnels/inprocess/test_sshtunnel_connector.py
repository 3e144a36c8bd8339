"""sshtunnel's own forwarding, which is used where a paramiko lacks the private parts that our channels need."""

from __future__ import annotations

import asyncio

import pytest

from gpumesh.tunnels.inprocess import channel_multiplexer
from tests.tunnels.inprocess.connecting import connected
from tests.tunnels.sshd import Sshd, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs_sshd]


async def test_the_fallback_forwards(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_multiplexer, "find_missing_feature", lambda _: "for this test")
    async with serving(echo) as port, connected(sshd.spec(), port) as (connection, (local,)):
        answers = await asyncio.gather(*(exchange(local, b"%d" % number) for number in range(40)))
        assert answers == [b"%d" % number for number in range(40)]
        reader, writer = await asyncio.open_connection("127.0.0.1", local)
        writer.write(b"x")
        await reader.readexactly(1)
        writer.close()
        assert await connection.ping(10.0) is not None
