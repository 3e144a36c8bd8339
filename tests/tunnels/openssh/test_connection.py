"""A connection of the system's ssh, in this process, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import shutil
import signal
import stat
from pathlib import Path

import pytest

from tests.tunnels.openssh.connecting import connected
from tests.tunnels.sshd import Sshd, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]


# -- the connection --------------------------------------------------------------------------------------------------


async def test_forwards_with_half_close_and_many_at_once(sshd: Sshd, folder: Path) -> None:
    async with serving(echo) as port, connected(sshd.spec(), folder, port) as (connection, (local,)):
        assert connection.info.rtt_ms is not None
        master, forwarder = connection._master, connection._forwarder
        assert repr(master) == f"<OpensshMaster pid {master.process.pid} ECHOING>"
        assert repr(forwarder) == "<Forwarder RUNNING 1 listeners 0 connections>"
        assert repr(connection) == f"<OpensshConnection 127.0.0.1:{sshd.port} {master!r} {forwarder!r}>"
        answers = await asyncio.gather(*(exchange(local, bytes([n]) * 50_000) for n in range(20)))
        assert answers == [bytes([n]) * 50_000 for n in range(20)]


async def test_sockets_have_mode_0600(sshd: Sshd, folder: Path) -> None:
    async with connected(sshd.spec(password_env="P"), folder, 1, password="x"):
        sockets = [path for path in folder.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
        assert len(sockets) >= 2
        assert {stat.S_IMODE(path.stat().st_mode) for path in sockets} == {0o600}


@pytest.mark.slow
async def test_a_login_shell_that_is_slow_to_start(tmp_path: Path, folder: Path) -> None:
    """The shell's start-up files take longer than a ping may."""
    slow = {"ForceCommand": 'sleep 4.5; echo Welcome; exec sh -c "$SSH_ORIGINAL_COMMAND"'}
    async with (
        Sshd(tmp_path, slow) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), folder, port) as (connection, (local,)),
    ):
        assert await connection.ping(2.5) is not None
        assert await connection.ping(2.5) is not None
        await exchange(local, b"hello")


async def test_a_ping_starts_nothing_on_a_host_without_commands(tmp_path: Path, folder: Path) -> None:
    """Each run of the forced command leaves a line. One is from the login, which asks for a session with ``cat``."""
    runs = tmp_path / "runs"
    async with (
        Sshd(tmp_path / "bare", {"ForceCommand": f"echo run >>{runs}"}) as sshd,
        connected(sshd.spec(), folder) as (connection, _),
    ):
        for _ in range(3):
            assert await connection.ping(10.0) is not None
        assert runs.read_text() == "run\n"
        assert sshd.log().count("subsystem not found") == 1


@pytest.mark.parametrize("options", [{"ForceCommand": "/bin/false"}, {"MaxSessions": "0"}])
async def test_a_host_without_commands_still_forwards(tmp_path: Path, folder: Path, options: dict[str, str]) -> None:
    async with (
        Sshd(tmp_path / "bare", options) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), folder, port) as (connection, (local,)),
    ):
        assert await exchange(local, b"hello") == b"hello"
        assert await connection.ping(10.0) is not None


async def test_a_killed_session_is_noticed_at_once_and_a_frozen_one_by_ping(sshd: Sshd, folder: Path) -> None:
    async with connected(sshd.spec(), folder) as (connection, _):
        sshd.kill_sessions(signal.SIGSTOP)
        assert await connection.ping(0.2) is None
        sshd.kill_sessions(signal.SIGKILL)
        async with asyncio.timeout(10):
            error = await connection.wait_lost()
        assert error.code == "tunnel-lost"
        assert await connection.ping(1.0) is None
