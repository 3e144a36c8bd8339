"""The interface of a transport: the same tests for both transports, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.errors import ExecError
from gpumesh.topology import SshSpec, Target, TransportKind
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.inprocess.connection import ParamikoConnection
from gpumesh.tunnels.openssh.connection import OpensshConnection
from gpumesh.tunnels.transport import ConnectFunction, ConnectRequest, HostConnection, RemoteCommand
from gpumesh.tunnels.transports import load_connect
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.supervised import descendants, descriptors
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@pytest.fixture(params=list(TransportKind))
def connect(request: pytest.FixtureRequest) -> ConnectFunction:
    return load_connect(request.param)


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd:
        yield sshd


@contextlib.asynccontextmanager
async def connected(
    connect: ConnectFunction, ssh: SshSpec, folder: Path, *ports: int
) -> AsyncIterator[tuple[HostConnection, list[int]]]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener()) for _ in ports]
        targets = tuple(Target("127.0.0.1", port) for port in ports)
        connection = await connect(
            ConnectRequest("iceland", ssh, targets, control_dir=str(folder)), listeners, RecordedEvents()
        )
        try:
            yield connection, [sock.getsockname()[1] for sock in listeners]
        finally:
            await connection.close()


async def read_first_line(running: RemoteCommand) -> bytes:
    piece = await asyncio.wait_for(running.read(), 20)
    assert piece is not None
    assert piece[0] is OutputStream.STDOUT
    return piece[1]


async def read_to_end(running: RemoteCommand) -> None:
    async with asyncio.timeout(20):
        while await running.read():
            pass


async def test_reading_a_command_after_its_end_returns_none(connect: ConnectFunction, sshd: Sshd, folder: Path) -> None:
    async with connected(connect, sshd.spec(), folder) as (connection, _):
        running = await connection.start_command("sh -c 'head -c 200000 /dev/zero; echo err >&2; exit 9'")
        counts = {OutputStream.STDOUT: 0, OutputStream.STDERR: 0}
        async with asyncio.timeout(20):
            while piece := await running.read():
                assert 0 < len(piece[1]) <= 32 * 1024
                counts[piece[0]] += len(piece[1])
            assert await running.read() is None
        assert (counts[OutputStream.STDOUT], counts[OutputStream.STDERR], running.exit_status) == (200_000, 4, 9)
        await running.kill()
        await running.kill()
        assert running.exit_status == 9


async def test_a_command_that_is_not_read_stops_on_the_host(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path
) -> None:
    """Endless output waits on the host, not in our memory."""
    count = tmp_path / "count"
    script = f"i=0; while [ $i -lt 4000 ]; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > {count}; done"
    async with connected(connect, sshd.spec(), folder) as (connection, _):
        running = await connection.start_command(f"sh -c '{script}'")
        await running.read()

        async def written() -> int:
            with contextlib.suppress(ValueError, FileNotFoundError):
                return int(count.read_text())
            return 0

        before, still = -1, 0
        async with asyncio.timeout(30):
            while still < 10:
                now = await written()
                still = still + 1 if now == before and now else 0
                before = now
                await asyncio.sleep(0.05)
        assert 0 < before < 1000  # of 4000, 64 KiB each
        assert await connection.ping(10.0) is not None
        await running.kill()


async def test_a_lost_connection_gives_errors_to_later_callers(
    connect: ConnectFunction, sshd: Sshd, folder: Path
) -> None:
    async with connected(connect, sshd.spec(), folder, 1) as (connection, _):
        running = await connection.start_command("sh -c 'echo go; exec sleep 600'")
        assert await read_first_line(running) == b"go\n"
        lost = asyncio.create_task(connection.wait_lost())
        await asyncio.sleep(0)
        assert not lost.done()
        sshd.kill_sessions(signal.SIGKILL)
        error = await asyncio.wait_for(lost, 20)
        assert (error.code, error.needs_person) == ("tunnel-lost", False)
        assert (await connection.wait_lost()).code == "tunnel-lost"  # a later caller gets it too
        with pytest.raises(ExecError):
            await read_to_end(running)
        await running.kill()
        assert await connection.ping(5.0) is None
        with pytest.raises(ExecError):
            await read_to_end(await connection.start_command("true"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_error_in_the_forwarding_thread_is_a_lost_connection(
    connect: ConnectFunction, sshd: Sshd, folder: Path
) -> None:
    """Otherwise clients of the port would wait for ever."""
    async with connected(connect, sshd.spec(), folder, 1) as (connection, _):
        waiting = asyncio.create_task(connection.wait_lost())
        if isinstance(connection, OpensshConnection):
            forwarder = connection._forwarder
        else:
            assert isinstance(connection, ParamikoConnection)
            assert connection._forwarder is not None
            forwarder = connection._forwarder._server_list[0]._forwarder
        forwarder.post([].pop)  # raises IndexError in the selector's thread
        assert (await asyncio.wait_for(waiting, 20)).code == "tunnel-lost"


async def test_closing_leaves_nothing_here_or_there(connect: ConnectFunction, sshd: Sshd, folder: Path) -> None:
    before = descriptors()
    for _ in range(3):
        async with serving(echo) as port, connected(connect, sshd.spec(), folder, port) as (connection, (local,)):
            assert await exchange(local, b"x") == b"x"
            running = await connection.start_command("sleep 600")
            reader, writer = await asyncio.open_connection("127.0.0.1", local)
            writer.write(b"half")
            assert await reader.readexactly(4) == b"half"
            await running.kill()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await wait_until(lambda: not sshd.children(), "the end of the session")
        for path in folder.iterdir():  # the supervisor would remove this folder
            path.unlink()
    await wait_until(lambda: descriptors() == before, f"{before} as before, not {descriptors()}")
    assert sshd.process is not None
    assert descendants(os.getpid()) == [sshd.process.pid]


@pytest.mark.exclusive
async def test_small_answers_are_not_delayed(connect: ConnectFunction, sshd: Sshd, folder: Path) -> None:
    """docs/internals/tunnels.md says how. Otherwise each of these answers takes 40 ms or more, on any machine."""

    async def in_two_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            writer.write(b"header")
            await asyncio.sleep(0.001)
            writer.write(b"body")

    async with serving(in_two_pieces) as port, connected(connect, sshd.spec(), folder, port) as (_, (local,)):
        reader, writer = await asyncio.open_connection("127.0.0.1", local)
        times_s = []
        for _ in range(60):
            began = time.perf_counter()
            writer.write(b"?")
            await asyncio.wait_for(reader.readexactly(10), 20)
            times_s.append(time.perf_counter() - began)
        writer.close()
        assert statistics.median(times_s) < 0.030
