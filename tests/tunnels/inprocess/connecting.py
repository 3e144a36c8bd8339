"""Connections of transport ``sshtunnel`` in this process, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gpumesh.errors import TunnelError
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.inprocess.connection import ParamikoConnection, connect
from gpumesh.tunnels.transport import ConnectRequest, RemoteCommand
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import listener


@contextlib.asynccontextmanager
async def connected(
    ssh: SshSpec, *ports: int, events: RecordedEvents | None = None, interactive: bool = False, **secrets: str
) -> AsyncIterator[tuple[ParamikoConnection, list[int]]]:
    """The connection, and the local port for each of ``ports`` on the host."""
    targets = tuple(Target("127.0.0.1", port) for port in ports)
    listeners = [listener() for _ in ports]
    try:
        setup = ConnectRequest("iceland", ssh, targets, tuple(secrets.items()), interactive)
        connection = await connect(setup, listeners, events or RecordedEvents())
        try:
            yield connection, [sock.getsockname()[1] for sock in listeners]
        finally:
            await connection.close()
    finally:
        for sock in listeners:
            sock.close()


async def connect_error(ssh: SshSpec, events: RecordedEvents | None = None, **secrets: str) -> TunnelError:
    """The error of a connection that cannot be made."""
    with pytest.raises(TunnelError) as caught:
        async with connected(ssh, 1, events=events, interactive=events is not None, **secrets):
            pass
    assert caught.value.hint
    return caught.value


async def run_command(connection: ParamikoConnection, command: str) -> tuple[bytes, int | None]:
    running = await connection.start_command(command)
    output = b""
    async with asyncio.timeout(20):
        while (piece := await running.read()) is not None:
            stream, data = piece
            output += data if stream is OutputStream.STDOUT else b""
    await running.kill()
    return output, running.exit_status


async def read_first_output(running: RemoteCommand) -> bytes:
    """The first piece of its stdout. An sshd with a debug log level writes to a command's stderr."""
    while piece := await running.read():
        if piece[0] is OutputStream.STDOUT:
            return piece[1]
    raise AssertionError("there was no output")
