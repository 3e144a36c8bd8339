"""Commands on a host, against a real sshd: they end each by itself, and never the connection that they share."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpumesh.tunnels.inprocess.connection import ParamikoConnection, connect
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.inprocess.test_connection import Told
from tests.tunnels.sshd import Sshd, needs_sshd

pytestmark = [pytest.mark.real, needs_sshd]


async def end(connection: ParamikoConnection, command: str) -> int | None:
    running = await connection.start_command(command)
    while await running.read() is not None:
        pass
    await running.kill()
    return running.exit_status


@pytest.mark.slow
async def test_a_command_that_ends_by_itself_does_not_end_the_connection(tmp_path: Path) -> None:
    """The host closes a command's channel while we send our last words on it: sshd ends the whole connection when they
    come after our own close. It was so after some hundred commands: within the hour, at the pace of nvidia-smi."""
    commands, at_once = 1500, 3

    async def some(connection: ParamikoConnection) -> None:
        for _ in range(commands // at_once):
            assert await end(connection, "true") == 0

    async with Sshd(tmp_path) as sshd:
        connection = await connect(ConnectRequest("iceland", sshd.spec(), ()), [], Told())
        try:
            async with asyncio.timeout(50), asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(some(connection))
        finally:
            await connection.close()
        assert "Disconnecting" not in sshd.log()
