"""Connections of transport ``openssh`` in this process, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.errors import TunnelError
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.openssh.connection import OpensshConnection, connect
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, keygen, listener


def make_setup(ssh: SshSpec, folder: Path, *ports: int, interactive: bool = False, **secrets: str) -> ConnectRequest:
    targets = tuple(Target("127.0.0.1", port) for port in ports)
    return ConnectRequest("iceland", ssh, targets, tuple(secrets.items()), interactive, str(folder))


@contextlib.asynccontextmanager
async def connected(
    ssh: SshSpec, folder: Path, *ports: int, events: RecordedEvents | None = None, **secrets: str
) -> AsyncIterator[tuple[OpensshConnection, list[int]]]:
    listeners = [listener() for _ in ports]
    try:
        setup = make_setup(ssh, folder, *ports, interactive=events is not None and events.has_person, **secrets)
        connection = await connect(setup, listeners, events or RecordedEvents())
        try:
            yield connection, [sock.getsockname()[1] for sock in listeners]
        finally:
            await connection.close()
            for path in folder.iterdir():
                path.unlink()
    finally:
        for sock in listeners:
            sock.close()


async def connect_error(
    ssh: SshSpec, folder: Path, events: RecordedEvents | None = None, **secrets: str
) -> TunnelError:
    with pytest.raises(TunnelError) as caught:
        async with connected(ssh, folder, 1, events=events, **secrets):
            pass
    for path in folder.iterdir():
        path.unlink()
    return caught.value


async def run_command(connection: OpensshConnection, command: str) -> tuple[bytes, bytes, int | None]:
    running = await connection.start_command(command)
    output = {OutputStream.STDOUT: b"", OutputStream.STDERR: b""}
    try:
        async with asyncio.timeout(20):
            while (piece := await running.read()) is not None:
                output[piece[0]] += piece[1]
    finally:
        await running.kill()
    return output[OutputStream.STDOUT], output[OutputStream.STDERR], running.exit_status


def make_other_key(sshd: Sshd) -> str:
    """As the two fields of a known_hosts line."""
    path = sshd.folder / "some_other_key"
    key = path if path.exists() else keygen(path)
    return " ".join(key.with_suffix(".pub").read_text().split()[:2])
