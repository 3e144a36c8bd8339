"""The pool and its zygote: spawning, killing, and that nothing outlives the mesh."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.errors import TunnelDown
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.workers.protocol import Close, Failed, Ping, Pong
from gpumesh.tunnels.workers.worker_pool import WorkerHandle, WorkerPool
from gpumesh.tunnels.workers.zygote import Zygote
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import listener

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with WorkerPool() as pool:
        yield pool


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """The port of a server that accepts and sends nothing: a worker that connects to it goes on waiting."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def make_setup(port: int, *, node: str = "iceland", timeout_s: float = 60.0, **secrets: str) -> ConnectRequest:
    ssh = SshSpec(
        "127.0.0.1", port, connect_timeout_s=timeout_s, agent=False, known_hosts=Path("/nonexistent/known_hosts")
    )
    return ConnectRequest(node, ssh, (Target("127.0.0.1", 1),), tuple(secrets.items()))


async def spawn(pool: WorkerPool, setup: ConnectRequest) -> WorkerHandle:
    with listener() as local:
        return await pool.spawn(setup, [local])


async def test_a_worker_reports_its_failure_and_ends(pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with await spawn(pool, make_setup(port)) as worker:
        message = await worker.receive()
        assert isinstance(message, Failed)
        assert message.code == "connect-refused"
        assert str(port) in message.message
        assert message.hint is not None
        assert await worker.receive() is None
        await wait_until(lambda: not alive(worker.pid), "the worker's end")
        with pytest.raises(TunnelDown):
            await worker.send(Close())


async def test_messages_go_both_ways_while_it_connects(pool: WorkerPool, silent_port: int) -> None:
    async with await spawn(pool, make_setup(silent_port)) as worker:
        await worker.send(Ping(7, 1.0))
        assert await worker.receive() == Pong(7, None)
        assert repr(worker) == f"<WorkerHandle iceland pid {worker.pid} RUNNING>"
        assert repr(pool) == f"<WorkerPool zygote {pool.zygote_pid} 0 forks pending>"
        await worker.send(Close())
        assert await worker.receive() is None
        assert repr(worker) == f"<WorkerHandle iceland pid {worker.pid} ENDED>"


@linux_only
async def test_kill_ends_a_worker_at_once_and_it_is_reaped(pool: WorkerPool, silent_port: int) -> None:
    async with await spawn(pool, make_setup(silent_port)) as worker:
        worker.kill()
        assert await worker.receive() is None
        await wait_until(lambda: not Path(f"/proc/{worker.pid}").exists(), "the worker reaped")
        worker.kill()  # harmless


@linux_only
async def test_closing_a_handle_ends_its_worker_alone(pool: WorkerPool, silent_port: int) -> None:
    async with (
        await spawn(pool, make_setup(silent_port)) as first,
        await spawn(pool, make_setup(silent_port)) as second,
    ):
        assert first.pid != second.pid
        await first.close()
        await wait_until(lambda: not alive(first.pid), "the first worker's end")
        await second.send(Ping(1, 1.0))
        assert await second.receive() == Pong(1, None)


@linux_only
async def test_leaving_the_pool_leaves_no_process(silent_port: int) -> None:
    async with WorkerPool() as pool:
        worker = await spawn(pool, make_setup(silent_port))
        zygote = pool.zygote_pid
        assert zygote is not None
    assert not Path(f"/proc/{zygote}").exists()
    assert not alive(worker.pid)
    assert await worker.receive() is None
    await worker.close()


@linux_only
async def test_a_dead_zygote_ends_its_workers_and_is_replaced(pool: WorkerPool, silent_port: int) -> None:
    async with await spawn(pool, make_setup(silent_port)) as worker:
        zygote = pool.zygote_pid
        assert zygote is not None
        os.kill(zygote, signal.SIGKILL)
        assert await worker.receive() is None
        async with await spawn(pool, make_setup(silent_port)) as another:
            assert pool.zygote_pid != zygote
            await another.send(Ping(1, 1.0))
            assert await another.receive() == Pong(1, None)


async def test_many_spawns_at_once_and_cancelled_ones(pool: WorkerPool, silent_port: int) -> None:
    tasks = [asyncio.create_task(spawn(pool, make_setup(silent_port, node=f"n{number}"))) for number in range(12)]
    await pool.prestart()
    for task in tasks[::3]:
        task.cancel()
    workers = [
        result for result in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(result, WorkerHandle)
    ]
    assert len(workers) >= 8
    assert len({worker.pid for worker in workers}) == len(workers)
    for worker in workers:
        await worker.send(Ping(1, 1.0))
        assert await worker.receive() == Pong(1, None)
        await worker.close()


@linux_only
async def test_more_spawns_than_the_zygotes_socket_holds(pool: WorkerPool, silent_port: int) -> None:
    await pool.prestart()
    assert pool._control is not None
    assert pool.zygote_pid is not None
    pool._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel gives: a few lines
    os.kill(pool.zygote_pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(spawn(pool, make_setup(silent_port, node=f"n{number}"))) for number in range(20)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)
    os.kill(pool.zygote_pid, signal.SIGCONT)
    workers = await asyncio.gather(*tasks)
    assert len({worker.pid for worker in workers}) == len(tasks)
    for number, worker in enumerate(workers):
        await wait_until(lambda worker=worker: bool(read_title(worker.pid)), "its title")  # type: ignore[misc]
        await worker.send(Ping(number, 1.0))
        assert await worker.receive() == Pong(number, None)
        assert read_title(worker.pid) == f"gpumesh tunnel n{number}"  # each worker got its own sockets
        await worker.close()


def read_title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


@linux_only
async def test_all_waiting_spawns_move_to_the_next_zygote(pool: WorkerPool, silent_port: int) -> None:
    await pool.prestart()
    first = pool.zygote_pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    tasks = [asyncio.create_task(spawn(pool, make_setup(silent_port))) for _ in range(6)]
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    workers = await asyncio.gather(*tasks)  # all of them are forked by one other zygote
    assert pool.zygote_pid not in (None, first)
    for worker in workers:
        await worker.send(Ping(1, 1.0))
        assert await worker.receive() == Pong(1, None)
        await worker.close()


@linux_only
async def test_no_secret_is_in_arguments_or_environment_and_the_title_names_the_node(
    pool: WorkerPool, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make_setup(silent_port, password="hunter2-planted", passphrase="correct-horse-planted")
    assert "planted" not in repr(setup)
    async with await spawn(pool, setup) as worker:
        await worker.send(Ping(1, 1.0))
        await worker.receive()
        for pid in (worker.pid, pool.zygote_pid):
            for name in ("cmdline", "environ", "comm"):
                assert b"planted" not in Path(f"/proc/{pid}/{name}").read_bytes()
        title = Path(f"/proc/{worker.pid}/cmdline").read_bytes()
        assert title.rstrip(b"\0") == b"gpumesh tunnel iceland"
        assert title.count(b"\0") > 1  # the rest of the old arguments is gone
    assert "planted" not in caplog.text


@linux_only
async def test_a_worker_has_no_descriptor_of_another(pool: WorkerPool, silent_port: int) -> None:
    """An inherited socket would keep a dead worker's connection, or a closed port, open."""

    def descriptors(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    async def count_descriptors(worker: WorkerHandle) -> int:
        await worker.send(Ping(1, 1.0))
        await worker.receive()
        return descriptors(worker.pid)

    async with await spawn(pool, make_setup(silent_port)) as first:
        before = await count_descriptors(first)
        async with (
            await spawn(pool, make_setup(silent_port)) as second,
            await spawn(pool, make_setup(silent_port)) as third,
        ):
            assert await count_descriptors(second) <= before + 1  # it may have opened its connection already
            assert await count_descriptors(third) <= before + 1
    assert pool.zygote_pid is not None
    assert descriptors(pool.zygote_pid) <= 8


PARENT = """
import asyncio, sys
from tests.tunnels.workers.test_worker_pool import make_setup, spawn
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from gpumesh.tunnels.workers.protocol import Ping

async def main():
    async with WorkerPool() as pool:
        workers = [await spawn(pool, make_setup(int(sys.argv[1]))) for _ in range(3)]
        for worker in workers:  # until each of them handles messages
            await worker.send(Ping(1, 1.0))
            await worker.receive()
        print(pool.zygote_pid, *(worker.pid for worker in workers), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
async def test_kill_9_of_the_parent_leaves_no_process(silent_port: int, frozen: bool) -> None:
    """``frozen``: workers that cannot read their sockets (SIGSTOP) end all the same, by PR_SET_PDEATHSIG."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(silent_port), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
    assert len(pids) == 4
    if frozen:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGSTOP)
    parent.kill()
    await parent.wait()
    try:
        await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_pool_and_a_zygote_show_their_state() -> None:
    assert repr(WorkerPool()) == "<WorkerPool NOT STARTED 0 forks pending>"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert repr(Zygote(ours)) == f"<Zygote {os.getpid()} 0 workers>"
