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
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import listener

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with WorkerPool() as pool:
        yield pool


@pytest.fixture
async def silent() -> AsyncIterator[int]:
    """The port of a server that accepts and says nothing: a worker that connects to it stays."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def setup(port: int, *, node: str = "iceland", timeout_s: float = 60.0, **secrets: str) -> ConnectRequest:
    ssh = SshSpec(
        "127.0.0.1", port, connect_timeout_s=timeout_s, agent=False, known_hosts=Path("/nonexistent/known_hosts")
    )
    return ConnectRequest(node, ssh, (Target("127.0.0.1", 1),), tuple(secrets.items()))


async def spawn(pool: WorkerPool, wanted: ConnectRequest) -> WorkerHandle:
    with listener() as local:
        return await pool.spawn(wanted, [local])


async def test_a_worker_tells_why_it_failed_and_ends(pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with await spawn(pool, setup(port)) as worker:
        message = await worker.receive()
        assert isinstance(message, Failed)
        assert message.code == "connect-refused"
        assert str(port) in message.message
        assert message.hint is not None
        assert await worker.receive() is None
        await wait_until(lambda: not alive(worker.pid), "the worker's end")
        with pytest.raises(TunnelDown):
            await worker.send(Close())


async def test_messages_go_both_ways_while_it_connects(pool: WorkerPool, silent: int) -> None:
    async with await spawn(pool, setup(silent)) as worker:
        await worker.send(Ping(7, 1.0))
        assert await worker.receive() == Pong(7, None)
        await worker.send(Close())
        assert await worker.receive() is None


@linux_only
async def test_kill_ends_a_worker_at_once_and_it_is_reaped(pool: WorkerPool, silent: int) -> None:
    async with await spawn(pool, setup(silent)) as worker:
        worker.kill()
        assert await worker.receive() is None
        await wait_until(lambda: not Path(f"/proc/{worker.pid}").exists(), "the worker reaped")
        worker.kill()  # harmless


@linux_only
async def test_closing_a_handle_ends_its_worker_alone(pool: WorkerPool, silent: int) -> None:
    async with await spawn(pool, setup(silent)) as first, await spawn(pool, setup(silent)) as second:
        assert first.pid != second.pid
        await first.close()
        await wait_until(lambda: not alive(first.pid), "the first worker's end")
        await second.send(Ping(1, 1.0))
        assert await second.receive() == Pong(1, None)


@linux_only
async def test_leaving_the_pool_leaves_no_process(silent: int) -> None:
    async with WorkerPool() as pool:
        worker = await spawn(pool, setup(silent))
        zygote = pool.zygote_pid
        assert zygote is not None
    assert not Path(f"/proc/{zygote}").exists()
    assert not alive(worker.pid)
    assert await worker.receive() is None
    await worker.close()


@linux_only
async def test_a_dead_zygote_takes_its_workers_along_and_is_replaced(pool: WorkerPool, silent: int) -> None:
    async with await spawn(pool, setup(silent)) as worker:
        zygote = pool.zygote_pid
        assert zygote is not None
        os.kill(zygote, signal.SIGKILL)
        assert await worker.receive() is None
        async with await spawn(pool, setup(silent)) as another:
            assert pool.zygote_pid != zygote
            await another.send(Ping(1, 1.0))
            assert await another.receive() == Pong(1, None)


async def test_many_spawns_at_once_and_cancelled_ones(pool: WorkerPool, silent: int) -> None:
    tasks = [asyncio.create_task(spawn(pool, setup(silent, node=f"n{number}"))) for number in range(12)]
    await pool.prestart()
    for task in tasks[::3]:
        task.cancel()
    workers = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, WorkerHandle)]
    assert len(workers) >= 8
    assert len({worker.pid for worker in workers}) == len(workers)
    for worker in workers:
        await worker.send(Ping(1, 1.0))
        assert await worker.receive() == Pong(1, None)
        await worker.close()


@linux_only
async def test_more_spawns_than_the_zygotes_socket_holds(pool: WorkerPool, silent: int) -> None:
    await pool.prestart()
    assert pool._control is not None
    assert pool.zygote_pid is not None
    pool._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel gives: a few lines
    os.kill(pool.zygote_pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(spawn(pool, setup(silent, node=f"n{number}"))) for number in range(20)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)
    os.kill(pool.zygote_pid, signal.SIGCONT)
    workers = await asyncio.gather(*tasks)
    assert len({worker.pid for worker in workers}) == len(tasks)
    for number, worker in enumerate(workers):
        await wait_until(lambda worker=worker: bool(title(worker.pid)), "its title")  # type: ignore[misc]
        await worker.send(Ping(number, 1.0))
        assert await worker.receive() == Pong(number, None)
        assert title(worker.pid) == f"gpumesh tunnel n{number}"  # each got its own sockets
        await worker.close()


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


@linux_only
async def test_all_that_wait_hear_of_a_dead_zygote(pool: WorkerPool, silent: int) -> None:
    await pool.prestart()
    first = pool.zygote_pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    tasks = [asyncio.create_task(spawn(pool, setup(silent))) for _ in range(6)]
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    workers = await asyncio.gather(*tasks)  # all by another, and that one for all
    assert pool.zygote_pid not in (None, first)
    for worker in workers:
        await worker.send(Ping(1, 1.0))
        assert await worker.receive() == Pong(1, None)
        await worker.close()


@linux_only
async def test_no_secret_is_in_arguments_or_environment_and_ps_tells_who_it_is(
    pool: WorkerPool, silent: int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = setup(silent, password="hunter2-planted", passphrase="correct-horse-planted")
    assert "planted" not in repr(wanted)
    async with await spawn(pool, wanted) as worker:
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
async def test_a_worker_has_no_descriptor_of_another(pool: WorkerPool, silent: int) -> None:
    """An inherited socket would keep a dead worker's connection, or a closed port, alive."""

    def descriptors(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    async def settled(worker: WorkerHandle) -> int:
        await worker.send(Ping(1, 1.0))
        await worker.receive()
        return descriptors(worker.pid)

    async with await spawn(pool, setup(silent)) as first:
        before = await settled(first)
        async with await spawn(pool, setup(silent)) as second, await spawn(pool, setup(silent)) as third:
            assert await settled(second) <= before + 1  # its connection may be a moment further
            assert await settled(third) <= before + 1
    assert pool.zygote_pid is not None
    assert descriptors(pool.zygote_pid) <= 8


PARENT = """
import asyncio, sys
from tests.tunnels.workers.test_worker_pool import setup, spawn
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from gpumesh.tunnels.workers.protocol import Ping

async def main():
    async with WorkerPool() as pool:
        workers = [await spawn(pool, setup(int(sys.argv[1]))) for _ in range(3)]
        for worker in workers:  # until each has come so far that it listens
            await worker.send(Ping(1, 1.0))
            await worker.receive()
        print(pool.zygote_pid, *(worker.pid for worker in workers), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
async def test_kill_9_of_the_parent_leaves_no_process(silent: int, frozen: bool) -> None:
    """``frozen``: workers that cannot read their sockets (SIGSTOP) end all the same, by PR_SET_PDEATHSIG."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(silent), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
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
