"""A connection of paramiko, in this process, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import pytest

from gpumesh.errors import ExecError
from gpumesh.topology import Target
from gpumesh.tunnels.inprocess.connection import connect
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.inprocess.connecting import connected
from tests.tunnels.polling import wait_until
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, listener, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs_sshd]


# -- the connection --------------------------------------------------------------------------------------------------


async def test_up_ping_and_a_clean_end(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        assert connection.info.server.startswith("SSH-2.0-OpenSSH")
        assert connection.info.cipher == "aes128-gcm@openssh.com"
        assert connection.info.rtt_ms is not None
        assert repr(connection) == f"<ParamikoConnection 127.0.0.1:{sshd.port} UP>"
        answers = await asyncio.gather(*(connection.ping(10.0) for _ in range(5)))
        assert all(rtt_ms is not None for rtt_ms in answers)
        session = sshd.children()
        assert session
    await wait_until(lambda: not set(sshd.children()) & set(session), "sshd's session ended")


async def test_a_killed_session_is_noticed_at_once_and_a_frozen_one_by_ping(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        sshd.kill_sessions(signal.SIGSTOP)
        assert await connection.ping(0.2) is None
        assert await connection.ping(0.05) is None  # not the late answer to the ping before
        sshd.kill_sessions(signal.SIGKILL)
        async with asyncio.timeout(10):
            error = await connection.wait_lost()
        assert error.code == "tunnel-lost"
        assert str(sshd.port) in error.message
        assert await connection.ping(1.0) is None
        with pytest.raises(ExecError):
            await connection.start_command("true")


async def test_other_ciphers_work_where_gcm_is_not_offered(tmp_path: Path) -> None:
    async with (
        Sshd(tmp_path / "sshd", {"Ciphers": "aes256-ctr", "MACs": "hmac-sha2-256-etm@openssh.com"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port) as (connection, (local,)),
    ):
        assert connection.info.cipher == "aes256-ctr"
        assert await exchange(local, b"x" * 300_000) == b"x" * 300_000


# -- forwarding ------------------------------------------------------------------------------------------------------


async def test_each_listener_leads_to_its_own_target(sshd: Sshd) -> None:
    async def name(letter: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(letter)

    async with (
        serving(lambda _, writer: name(b"a", writer)) as a,
        serving(lambda _, writer: name(b"b", writer)) as b,
        connected(sshd.spec(), a, b) as (_, (to_a, to_b)),
    ):
        assert await exchange(to_a, b"") == b"a"
        assert await exchange(to_b, b"") == b"b"


async def test_forbidden_and_unreachable_targets_are_reported(tmp_path: Path) -> None:
    events = RecordedEvents()
    async with (
        Sshd(tmp_path / "sshd", {"AllowTcpForwarding": "no"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port, events=events) as (connection, (local,)),
    ):
        with pytest.raises(ConnectionResetError):
            await exchange(local, b"x")
        await wait_until(lambda: bool(events.forward_failures), "the report")
        assert events.forward_failures == [(Target("127.0.0.1", port), "forwarding-forbidden")]
        assert await connection.ping(10.0) is not None
    events = RecordedEvents()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with (
        Sshd(tmp_path / "other", {"PermitOpen": f"127.0.0.1:{port}"}) as sshd,
        connected(sshd.spec(), port, 9, events=events) as (_, (local, forbidden)),
    ):
        for port_of_target in (local, forbidden):
            with pytest.raises(ConnectionResetError):
                await exchange(port_of_target, b"x")
        await wait_until(lambda: len(events.forward_failures) == 2, "both reports")
        assert [code for _, code in events.forward_failures] == ["backend-unreachable", "forwarding-forbidden"]


async def test_traffic_goes_on_while_the_host_changes_keys(tmp_path: Path) -> None:
    async with (
        Sshd(tmp_path / "sshd", {"RekeyLimit": "1M", "LogLevel": "DEBUG1"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port) as (connection, (local,)),
    ):
        data = [bytes([number]) * 2_000_000 for number in range(6)]
        assert await asyncio.gather(*(exchange(local, payload) for payload in data)) == data
        assert await connection.ping(10.0) is not None
        assert sshd.log().count("SSH2_MSG_NEWKEYS received") > 3


async def test_a_lost_connection_resets_its_clients(sshd: Sshd) -> None:
    """A reset, not an ordinary end: half an answer must not look like a whole one."""
    async with serving(echo) as port, connected(sshd.spec(), port) as (connection, (local,)):
        reader, writer = await asyncio.open_connection("127.0.0.1", local)
        writer.write(b"half")
        assert await reader.readexactly(4) == b"half"
        sshd.kill_sessions()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await connection.wait_lost()
        writer.close()


async def test_clients_wait_for_the_connection_instead_of_being_refused(sshd: Sshd) -> None:
    async with serving(echo) as port:
        with listener() as local:
            early = asyncio.create_task(exchange(local.getsockname()[1], b"early"))
            setup = ConnectRequest("n", sshd.spec(), (Target("127.0.0.1", port),))
            first = await connect(setup, [local], RecordedEvents())
            assert await early == b"early"
            await first.close()
            between = asyncio.create_task(exchange(local.getsockname()[1], b"between"))
            second = await connect(setup, [local], RecordedEvents())
            assert await between == b"between"
            await second.close()
