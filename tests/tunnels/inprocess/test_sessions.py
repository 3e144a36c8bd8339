"""Commands on a host, against a real sshd: output, exit status, kill, and that the connection outlives them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import paramiko
import pytest

from gpumesh.errors import ExecError
from gpumesh.tunnels.inprocess.connection import ParamikoConnection, connect
from gpumesh.tunnels.inprocess.sessions import close_channel
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.inprocess.connecting import connected, read_first_output, run_command
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs_sshd]


def test_output_that_comes_during_the_close_is_written_nowhere() -> None:
    """paramiko's thread would write it to a pipe without a reader, and end the connection at the error."""
    channel: Any = paramiko.Channel(1)
    reader = channel.fileno()
    pipe = channel._pipe

    def close_with_output_in_between() -> None:
        os.close(reader)
        channel.in_buffer.feed(b"more")
        channel.in_stderr_buffer.feed(b"more")
        os.close(pipe._wfd)

    pipe.close = close_with_output_in_between
    close_channel(channel)


async def end(connection: ParamikoConnection, command: str) -> int | None:
    running = await connection.start_command(command)
    while await running.read() is not None:
        pass
    await running.kill()
    return running.exit_status


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_command_that_ends_by_itself_does_not_end_the_connection(tmp_path: Path) -> None:
    """The host closes a command's channel while we still send messages on it. sshd ends the whole connection when one
    of them comes after our own close. Without care that happens every few hundred commands."""
    commands, at_once = 600, 3

    async def some(connection: ParamikoConnection) -> None:
        for _ in range(commands // at_once):
            assert await end(connection, "true") == 0

    async with Sshd(tmp_path) as sshd:
        connection = await connect(ConnectRequest("iceland", sshd.spec(), ()), [], RecordedEvents())
        try:
            async with asyncio.timeout(200), asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(some(connection))
        finally:
            await connection.close()
        assert "Disconnecting" not in sshd.log()


# -- commands --------------------------------------------------------------------------------------------------------


async def test_output_status_and_standard_error(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        assert await run_command(connection, "sh -c 'printf hello; exit 3'") == (b"hello", 3)
        assert await run_command(connection, "sh -c 'cat; echo over'") == (b"over\n", 0)  # its input is at its end
        assert await run_command(connection, "sh -c 'kill -9 $$'") == (b"", 137)
        output, status = await run_command(connection, "head -c 3000000 /dev/zero")
        assert len(output) == 3_000_000
        assert status == 0
        many = await asyncio.gather(*(run_command(connection, f"echo {number}") for number in range(6)))
        assert [output for output, _ in many] == [b"%d\n" % number for number in range(6)]


async def test_kill_ends_the_command_on_the_host(sshd: Sshd, tmp_path: Path) -> None:
    async with connected(sshd.spec()) as (connection, _):
        running = await connection.start_command("sh -c 'sleep 600 & echo $$ $!; wait'")
        pids = [int(pid) for pid in (await read_first_output(running)).split()]
        await running.kill()
        await running.kill()
        await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
        assert await connection.ping(10.0) is not None


async def test_a_lost_connection_ends_its_commands_on_the_host(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        running = await connection.start_command("sh -c 'sleep 600 & echo $$ $!; wait'")
        pids = [int(pid) for pid in (await read_first_output(running)).split()]
        connection._transport.sock.close()
        await connection.wait_lost()
    await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")


async def test_a_host_without_a_posix_shell_gets_commands_as_they_are(tmp_path: Path) -> None:
    """Like Windows' cmd.exe, which does not know ``exec`` and answers every command with an error."""
    commands_seen = tmp_path / "asked"
    forced = f"/bin/sh -c 'echo \"$SSH_ORIGINAL_COMMAND\" >> {commands_seen}; echo unknown'"
    async with (
        Sshd(tmp_path / "sshd", {"ForceCommand": forced}) as sshd,
        connected(sshd.spec()) as (connection, _),
    ):
        assert await run_command(connection, "nvidia-smi -L") == (b"unknown\n", 0)
        running = await connection.start_command("anything")
        await running.kill()
    assert "nvidia-smi -L" in commands_seen.read_text().splitlines()


async def test_a_command_that_is_not_read_does_not_fill_memory(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        running = await connection.start_command("head -c 100000000 /dev/zero")
        await running.read()
        channel = running._channel  # type: ignore[attr-defined]
        await connection.ping(10.0)
        await connection.ping(10.0)
        assert len(channel.in_buffer) <= 4 << 20
        await running.kill()


async def test_sessions_that_the_host_refuses(tmp_path: Path) -> None:
    async with (
        Sshd(tmp_path / "sshd", {"MaxSessions": "0"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port) as (connection, (local,)),
    ):
        with pytest.raises(ExecError):
            await connection.start_command("true")
        assert await exchange(local, b"forwarding works all the same") == b"forwarding works all the same"
