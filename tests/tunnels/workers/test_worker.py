"""A worker's process, spoken to as a supervisor does, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.errors import TunnelDown
from gpumesh.topology import SshSpec, Target, TransportKind
from gpumesh.tunnels.inprocess import connection as inprocess_connection
from gpumesh.tunnels.openssh import connection as openssh_connection
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest
from gpumesh.tunnels.transports import load_connect
from gpumesh.tunnels.workers.protocol import (
    Close,
    Done,
    Exec,
    Failed,
    ForwardFailed,
    FromWorker,
    Kill,
    Lost,
    Output,
    Ping,
    Pong,
    Prompt,
    Reply,
)
from gpumesh.tunnels.workers.worker import CHUNK_BYTES
from gpumesh.tunnels.workers.worker_pool import WorkerHandle, WorkerPool
from tests.parts import needs
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.questioning_server import QuestioningServer, run_questioning_server
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

both = pytest.mark.parametrize("transport", list(TransportKind))


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd:
        yield sshd


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with WorkerPool() as pool:
        yield pool


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c")
    path.chmod(0o700)
    return path


def setup_of(ssh: SshSpec, folder: Path, *ports: int) -> ConnectRequest:
    return ConnectRequest("iceland", ssh, tuple(Target("127.0.0.1", port) for port in ports), control_dir=str(folder))


@contextlib.asynccontextmanager
async def started(pool: WorkerPool, setup: ConnectRequest) -> AsyncIterator[tuple[WorkerHandle, list[int]]]:
    """A worker, and the local port of each target."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener()) for _ in setup.targets]
        async with await pool.spawn(setup, listeners) as worker:
            yield worker, [one.getsockname()[1] for one in listeners]


async def heard(worker: WorkerHandle) -> FromWorker | None:
    return await asyncio.wait_for(worker.receive(), 20)


async def until_up(worker: WorkerHandle) -> None:
    message = await heard(worker)
    assert isinstance(message, ConnectionInfo), message


async def output_of(worker: WorkerHandle, number: int) -> tuple[bytes, bytes, Done]:
    """All that it says of a command, to its end; nothing else may come meanwhile."""
    said = {"stdout": b"", "stderr": b""}
    while isinstance(message := await heard(worker), Output):
        assert message.id == number
        data = base64.b64decode(message.data)
        assert len(data) <= CHUNK_BYTES
        said[message.stream] += data
    assert isinstance(message, Done)
    assert message.id == number
    return said["stdout"], said["stderr"], message


def test_each_transport_has_its_connect() -> None:
    assert load_connect(TransportKind.SSHTUNNEL) is inprocess_connection.connect
    assert load_connect(TransportKind.OPENSSH) is openssh_connection.connect


@both
async def test_a_connection_from_setup_to_close(
    sshd: Sshd, pool: WorkerPool, folder: Path, transport: TransportKind
) -> None:
    async with serving(echo) as port, started(pool, setup_of(sshd.spec(transport=transport), folder, port)) as made:
        worker, (local,) = made
        await worker.send(Exec(1, "true", 5.0, 10))  # too early
        assert await heard(worker) == Done(1, None, error="the tunnel is not up")
        await until_up(worker)
        assert await exchange(local, b"hello") == b"hello"
        await worker.send(Ping(2, 10.0))
        pong = await heard(worker)
        assert isinstance(pong, Pong)
        assert pong.rtt_ms is not None
        await worker.send(Exec(3, "sh -c 'echo out; echo err >&2; exit 3'", 20.0, 100))
        assert await output_of(worker, 3) == (b"out\n", b"err\n", Done(3, 3))
        await worker.send(Exec(4, "head -c 100000 /dev/zero", 20.0, 50_000))
        assert await output_of(worker, 4) == (bytes(50_000), b"", Done(4, 0, truncated=True))
        await worker.send(Exec(5, "sleep 600", 0.2, 100))
        assert (await output_of(worker, 5))[2].error == "no end of the command within 0.2 s"
        await worker.send(Close())
        assert await heard(worker) is None
        await wait_until(lambda: not alive(worker.pid), "the worker's end")
        await wait_until(lambda: not sshd.children(), "the end of the session")
        with pytest.raises(TunnelDown):
            await worker.send(Close())


@both
async def test_a_stream_is_passed_on_as_it_comes_and_can_be_killed(
    sshd: Sshd, pool: WorkerPool, folder: Path, transport: TransportKind
) -> None:
    async with started(pool, setup_of(sshd.spec(transport=transport), folder)) as (worker, _):
        await until_up(worker)
        await worker.send(Exec(1, "sh -c 'echo $$; exec sleep 600'", None, 0, stream=True))
        first = await heard(worker)
        assert isinstance(first, Output)
        pid = int(base64.b64decode(first.data))
        await worker.send(Kill(1))
        assert await heard(worker) == Done(1, None, error="stopped")
        await wait_until(lambda: not alive(pid), "the command's end")
        await worker.send(Kill(1))  # there is none any more
        await worker.send(Exec(2, "head -c 3000000 /dev/zero", None, 0, stream=True))
        assert len((await output_of(worker, 2))[0]) == 3_000_000


@both
async def test_a_lost_connection_is_told_and_the_process_ends(
    sshd: Sshd, pool: WorkerPool, folder: Path, transport: TransportKind
) -> None:
    async with started(pool, setup_of(sshd.spec(transport=transport), folder, 1)) as (worker, _):
        await until_up(worker)
        sshd.kill_sessions()
        lost = await heard(worker)
        assert isinstance(lost, Lost)
        assert lost.code == "tunnel-lost"
        assert await heard(worker) is None
        await wait_until(lambda: not alive(worker.pid), "the worker's end")


async def test_a_refused_forward_is_told(sshd: Sshd, pool: WorkerPool, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with started(pool, setup_of(sshd.spec(), folder, port)) as (worker, (local,)):
        await until_up(worker)
        with pytest.raises(ConnectionResetError):
            await exchange(local, b"x")
        told = await heard(worker)
        assert isinstance(told, ForwardFailed)
        assert (told.target.port, told.code) == (port, "backend-unreachable")


async def test_a_question_goes_to_the_supervisor(tmp_path: Path, pool: WorkerPool) -> None:
    server = QuestioningServer("keyboard-interactive", "", [("Code: ", True)], ["123"])
    async with run_questioning_server(tmp_path, server) as ssh:
        setup = replace(setup_of(ssh, tmp_path), interactive=True)
        async with started(pool, setup) as (worker, _):
            prompt = await heard(worker)
            assert isinstance(prompt, Prompt)
            assert "Code" in prompt.text
            assert prompt.echo
            await worker.send(Reply(99, "to nobody"))
            await worker.send(Reply(prompt.id, "123"))
            await worker.send(Reply(prompt.id, "too late"))
            await until_up(worker)
        async with started(pool, setup) as (worker, _):
            prompt = await heard(worker)
            assert isinstance(prompt, Prompt)
            await worker.send(Reply(prompt.id, None))
            failed = await heard(worker)
            assert isinstance(failed, Failed)
            assert failed.code == "auth-refused"


@pytest.mark.parametrize("how", ["end of the socket", "noise", "a second setup", "SIGTERM"])
async def test_what_ends_it(sshd: Sshd, pool: WorkerPool, folder: Path, how: str) -> None:
    setup = setup_of(sshd.spec(), folder, 1)
    async with started(pool, setup) as (worker, _):
        await until_up(worker)
        match how:
            case "end of the socket":
                await worker.close()
            case "noise":
                worker._writer.write(b"noise without a line's end")
                worker._writer.write_eof()
            case "a second setup":
                await worker.send(setup)
            case _:
                os.kill(worker.pid, signal.SIGTERM)
        await wait_until(lambda: not alive(worker.pid), "the worker's end")
        await wait_until(lambda: not sshd.children(), "the end of the session")


async def test_many_commands_at_once(sshd: Sshd, pool: WorkerPool, folder: Path) -> None:
    async with started(pool, setup_of(sshd.spec(), folder)) as (worker, _):
        await until_up(worker)
        count = 8
        for number in range(count):
            await worker.send(Exec(number, f"echo {number}", 30.0, 100))
        said: dict[int, bytes] = {}
        done: dict[int, Done] = {}
        while len(done) < count:
            message = await heard(worker)
            if isinstance(message, Output):
                said[message.id] = base64.b64decode(message.data)
            elif isinstance(message, Done):
                done[message.id] = message
        assert said == {number: b"%d\n" % number for number in range(count)}
        assert all(one.exit_status == 0 for one in done.values())
