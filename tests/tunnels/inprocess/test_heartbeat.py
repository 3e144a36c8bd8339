"""Pings over a real sshd whose connection is frozen for a while: it answers all requests of that time at once."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from gpumesh.tunnels.transport import PING_RESEND_S
from tests.prerequisites import needs
from tests.tunnels.inprocess.connecting import connected
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd

FROZEN_S = 2.5 * PING_RESEND_S


@pytest.mark.real
@pytest.mark.slow
@needs("sshd")
async def test_a_ping_is_sent_again_and_each_answer_belongs_to_its_own_ping(tmp_path: Path) -> None:
    async with Sshd(tmp_path / "sshd") as sshd, connected(sshd.spec()) as (connection, _):
        asked_before = sshd.log().count("keepalive@openssh.com")
        sshd.kill_sessions(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(FROZEN_S, sshd.kill_sessions, signal.SIGCONT)
        waited_ms = await connection.ping(30.0)
        assert waited_ms is not None
        assert waited_ms >= FROZEN_S * 900  # the first ping's answer, not the answer to a later ping
        await wait_until(lambda: sshd.log().count("keepalive@openssh.com") >= asked_before + 3, "three pings")
        # No late answer is taken for the answer to a newer ping.
        for _ in range(3):
            sshd.kill_sessions(signal.SIGSTOP)
            assert await connection.ping(0.05) is None
            sshd.kill_sessions(signal.SIGCONT)
            assert await connection.ping(30.0) is not None
