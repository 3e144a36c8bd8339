"""A worker's process; the test plays the supervisor, against a real OpenSSH sshd."""

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
    Failed,
    ForwardFailed,
    FromWorker,
    Input,
    Kill,
    Lost,
    OutputPiece,
    Ping,
    Pong,
    Prompt,
    Reply,
    StartCommand,
)
from gpumesh.tunnels.workers.worker import CHUNK_BYTES, Worker
from gpumesh.tunnels.workers.worker_pool import WorkerHandle, WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.questioning_server import QuestioningServer, run_questioning_server
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

both = pytest.mark.parametrize("transport", list(TransportKind))


def make_setup(ssh: SshSpec, folder: Path, *ports: int) -> ConnectRequest:
    return ConnectRequest("iceland", ssh, tuple(Target("127.0.0.1", port) for port in ports), control_dir=str(folder))


@contextlib.asynccontextmanager
async def started_worker(pool: WorkerPool, setup: ConnectRequest) -> AsyncIterator[tuple[WorkerHandle, list[int]]]:
    """A worker, and the local port of each target."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener()) for _ in setup.targets]
        async with await pool.spawn(setup, listeners) as worker:
            yield worker, [sock.getsockname()[1] for sock in listeners]


async def receive(worker: WorkerHandle) -> FromWorker | None:
    return await asyncio.wait_for(worker.receive(), 20)


async def wait_up(worker: WorkerHandle) -> None:
    message = await receive(worker)
    assert isinstance(message, ConnectionInfo), message


async def collect_output(worker: WorkerHandle, number: int) -> tuple[bytes, bytes, Done]:
    """All output of a command, to its end. No other message may come meanwhile."""
    output = {"stdout": b"", "stderr": b""}
    while isinstance(message := await receive(worker), OutputPiece):
        assert message.id == number
        data = base64.b64decode(message.data)
        assert len(data) <= CHUNK_BYTES
        output[message.stream] += data
    assert isinstance(message, Done)
    assert message.id == number
    return output["stdout"], output["stderr"], message


def test_each_transport_has_its_connect() -> None:
    assert load_connect(TransportKind.SSHTUNNEL) is inprocess_connection.connect
    assert load_connect(TransportKind.OPENSSH) is openssh_connection.connect


@both
async def test_a_connection_from_setup_to_close(
    sshd: Sshd, pool: WorkerPool, folder: Path, transport: TransportKind
) -> None:
    async with (
        serving(echo) as port,
        started_worker(pool, make_setup(sshd.spec(transport=transport), folder, port)) as made,
    ):
        worker, (local,) = made
        await worker.send(StartCommand(1, "true", 5.0, 10))  # too early
        assert await receive(worker) == Done(1, None, error="the tunnel is not up")
        await wait_up(worker)
        assert await exchange(local, b"hello") == b"hello"
        await worker.send(Ping(2, 10.0))
        pong = await receive(worker)
        assert isinstance(pong, Pong)
        assert pong.rtt_ms is not None
        await worker.send(StartCommand(3, "sh -c 'echo out; echo err >&2; exit 3'", 20.0, 100))
        assert await collect_output(worker, 3) == (b"out\n", b"err\n", Done(3, 3))
        await worker.send(StartCommand(4, "head -c 100000 /dev/zero", 20.0, 50_000))
        assert await collect_output(worker, 4) == (bytes(50_000), b"", Done(4, 0, truncated=True))
        await worker.send(StartCommand(5, "sleep 600", 0.2, 100))
        assert (await collect_output(worker, 5))[2].error == "no end of the command within 0.2 s"
        await worker.send(Close())
        assert await receive(worker) is None
        await wait_until(lambda: not alive(worker.pid), "the worker's end")
        await wait_until(lambda: not sshd.children(), "the end of the session")
        with pytest.raises(TunnelDown):
            await worker.send(Close())


@both
async def test_streamed_output_is_sent_at_once_and_the_command_can_be_killed(
    sshd: Sshd, pool: WorkerPool, folder: Path, transport: TransportKind
) -> None:
    async with started_worker(pool, make_setup(sshd.spec(transport=transport), folder)) as (worker, _):
        await wait_up(worker)
        await worker.send(StartCommand(1, "sh -c 'echo $$; exec sleep 600'", None, 0, stream=True))
        first = await receive(worker)
        assert isinstance(first, OutputPiece)
        pid = int(base64.b64decode(first.data))
        await worker.send(Kill(1))
        assert await receive(worker) == Done(1, None, error="stopped")
        await wait_until(lambda: not alive(pid), "the command's end")
        await worker.send(Kill(1))  # there is none any more
        await worker.send(StartCommand(2, "head -c 3000000 /dev/zero", None, 0, stream=True))
        assert len((await collect_output(worker, 2))[0]) == 3_000_000


@both
async def test_a_shell_reads_what_is_sent_and_gives_its_session_to_another_command(
    pool: WorkerPool, folder: Path, tmp_path: Path, transport: TransportKind
) -> None:
    """Transport openssh has one session of its own; the shell takes the last one that the host gives."""
    sessions = "2" if transport is TransportKind.OPENSSH else "1"
    async with (
        Sshd(tmp_path / "few", {"LogLevel": "INFO", "MaxSessions": sessions}) as sshd,
        started_worker(pool, make_setup(sshd.spec(transport=transport), folder)) as (worker, _),
    ):
        await wait_up(worker)
        await worker.send(StartCommand(1, "cat", None, 0, stream=True, has_input=True))
        await worker.send(Input(1, ""))
        for number in range(2):
            text = base64.b64encode(b"line %d\n" % number).decode()
            while True:  # until the host has given the session; input for a command that has not begun is dropped
                await worker.send(Input(1, text))
                with contextlib.suppress(TimeoutError):
                    piece = await asyncio.wait_for(worker.receive(), 0.5)
                    break
            assert isinstance(piece, OutputPiece), piece
            assert base64.b64decode(piece.data).startswith(b"line %d\n" % number)
        await worker.send(StartCommand(2, "echo other", 20.0, 100))
        messages = [await receive(worker)]
        while messages[-1] != Done(2, 0):
            messages.append(await receive(worker))
        assert Done(1, None, error="stopped") in messages
        assert OutputPiece(2, "stdout", base64.b64encode(b"other\n").decode()) in messages
        await worker.send(Input(1, text))  # it has ended: nothing happens
        await worker.send(Ping(3, 10.0))
        assert isinstance(await receive(worker), Pong)


@both
async def test_a_lost_connection_is_reported_and_ends_the_process(
    sshd: Sshd, pool: WorkerPool, folder: Path, transport: TransportKind
) -> None:
    async with started_worker(pool, make_setup(sshd.spec(transport=transport), folder, 1)) as (worker, _):
        await wait_up(worker)
        sshd.kill_sessions()
        lost = await receive(worker)
        assert isinstance(lost, Lost)
        assert lost.code == "tunnel-lost"
        assert await receive(worker) is None
        await wait_until(lambda: not alive(worker.pid), "the worker's end")


async def test_a_refused_forward_is_reported(sshd: Sshd, pool: WorkerPool, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with started_worker(pool, make_setup(sshd.spec(), folder, port)) as (worker, (local,)):
        await wait_up(worker)
        with pytest.raises(ConnectionResetError):
            await exchange(local, b"x")
        failed = await receive(worker)
        assert isinstance(failed, ForwardFailed)
        assert (failed.target.port, failed.code) == (port, "backend-unreachable")


async def test_a_question_goes_to_the_supervisor(tmp_path: Path, pool: WorkerPool) -> None:
    server = QuestioningServer("keyboard-interactive", "", [("Code: ", True)], ["123"])
    async with run_questioning_server(tmp_path, server) as ssh:
        setup = replace(make_setup(ssh, tmp_path), interactive=True)
        async with started_worker(pool, setup) as (worker, _):
            prompt = await receive(worker)
            assert isinstance(prompt, Prompt)
            assert "Code" in prompt.text
            assert prompt.echo
            await worker.send(Reply(99, "to nobody"))
            await worker.send(Reply(prompt.id, "123"))
            await worker.send(Reply(prompt.id, "too late"))
            await wait_up(worker)
        async with started_worker(pool, setup) as (worker, _):
            prompt = await receive(worker)
            assert isinstance(prompt, Prompt)
            await worker.send(Reply(prompt.id, None))
            failed = await receive(worker)
            assert isinstance(failed, Failed)
            assert failed.code == "auth-refused"


@pytest.mark.parametrize("how", ["end of the socket", "noise", "a second setup", "SIGTERM"])
async def test_events_that_end_a_worker(sshd: Sshd, pool: WorkerPool, folder: Path, how: str) -> None:
    setup = make_setup(sshd.spec(), folder, 1)
    async with started_worker(pool, setup) as (worker, _):
        await wait_up(worker)
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
    async with started_worker(pool, make_setup(sshd.spec(), folder)) as (worker, _):
        await wait_up(worker)
        count = 8
        for number in range(count):
            await worker.send(StartCommand(number, f"echo {number}", 30.0, 100))
        output: dict[int, bytes] = {}
        done: dict[int, Done] = {}
        while len(done) < count:
            message = await receive(worker)
            if isinstance(message, OutputPiece):
                output[message.id] = base64.b64decode(message.data)
            elif isinstance(message, Done):
                done[message.id] = message
        assert output == {number: b"%d\n" % number for number in range(count)}
        assert all(message.exit_status == 0 for message in done.values())


def test_a_worker_shows_its_state() -> None:
    assert repr(Worker([])) == "<Worker without a node CONNECTING 0 commands>"
