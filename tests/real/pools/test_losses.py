"""A running pool loses a part: its stream ends with an explicit error or goes on elsewhere, what is left of the pool is
ended, and it is started again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gpumesh.pools.base import PoolPhase
from tests.prerequisites import needs
from tests.real.hosts import LlamaServer
from tests.real.pools.pool_hosts import HEAD_PROGRAM, WORKER_PROGRAM, kill, real_program
from tests.real.pools.pool_mesh import ONE_POOL, PoolMesh, link_model, pool_entry, pool_mesh

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(150),
    pytest.mark.asyncio(loop_scope="module"),
    needs("sshd", "llama-server", "openai"),
]

MODEL = "small"
SHARED = "shared"  # the pool's model that another node has, too
TOKENS = 1500  # some three seconds
QUESTION: list[Any] = [{"role": "user", "content": "Why?"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> AsyncIterator[PoolMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    shared = link_model(small_model, folder, SHARED)
    async with LlamaServer(shared, alias=SHARED, context=2048) as other:
        spare = {"name": "spare", "backend": {"kind": "llamacpp", "url": other.url, "max_parallel": 2}}
        entries = [pool_entry(small_model), pool_entry(shared, name=SHARED)]
        async with pool_mesh(folder, entries, extra_nodes=[spare]) as made:
            yield made


async def read_stream(mesh: PoolMesh, lose: Callable[[PoolMesh], Awaitable[None]]) -> None:
    """Reads an answer to its end; a part of the pool is lost when the answer has begun."""
    async with mesh.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=TOKENS, stream=True)
        chunks = 0
        async for _ in stream:
            chunks += 1
            if chunks == 10:
                await lose(mesh)


async def kill_worker(mesh: PoolMesh) -> None:
    mesh.worker.kill_program(WORKER_PROGRAM)


async def kill_head(mesh: PoolMesh) -> None:
    mesh.head.kill_program(HEAD_PROGRAM)


async def cut_worker(mesh: PoolMesh) -> None:
    await mesh.worker.cut_sessions()


async def cut_head(mesh: PoolMesh) -> None:
    await mesh.head.cut_sessions()


LOSSES: tuple[Callable[[PoolMesh], Awaitable[None]], ...] = (kill_worker, kill_head, cut_worker, cut_head)


@pytest.mark.parametrize("lose", LOSSES, ids=[loss.__name__ for loss in LOSSES])
async def test_a_lost_part_ends_the_stream_with_an_error_and_the_pool_comes_back(
    mesh: PoolMesh, lose: Callable[[PoolMesh], Awaitable[None]]
) -> None:
    import openai

    before = await mesh.make_ready()
    old = {*mesh.head.pool_processes(), *mesh.worker.pool_processes()}
    with pytest.raises(openai.APIError) as failure:
        await read_stream(mesh, lose)
    assert not isinstance(failure.value, openai.APIConnectionError), "an explicit error, not a cut connection"
    await mesh.wait_phase(PoolPhase.READY, starts=before.starts + 1)
    assert mesh.programs() == ONE_POOL
    assert not old & {*mesh.head.pool_processes(), *mesh.worker.pool_processes()}
    await mesh.wait_answer(MODEL)
    await mesh.make_stopped()


async def test_a_worker_that_dies_idle_is_noticed(mesh: PoolMesh) -> None:
    """llama-server notices only at the next request; nobody may send one to a pool that is broken."""
    before = await mesh.make_ready()
    await kill_worker(mesh)
    await mesh.wait_phase(PoolPhase.READY, starts=before.starts + 1)
    assert await mesh.answers(MODEL)


async def test_a_foreign_head_at_a_worker_does_no_harm(mesh: PoolMesh) -> None:
    """It waits until the worker is free; so it is when it is killed, and when the pool ends."""
    await mesh.make_ready()
    (port,) = [socket.port for socket in mesh.worker.listening() if socket.program == WORKER_PROGRAM]
    command = [str(real_program(HEAD_PROGRAM)), "--rpc", f"127.0.0.1:{port}", "--list-devices"]
    for _ in range(2):
        foreign = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        assert await mesh.answers(MODEL)
        assert foreign.returncode is None, "it waits"
        foreign.kill()
        await foreign.wait()
    assert await mesh.answers(MODEL)
    await mesh.make_stopped()
    await mesh.make_ready()
    await mesh.make_stopped()


async def test_another_node_goes_on_with_the_stream(mesh: PoolMesh) -> None:
    asked: dict[str, Any] = {"model": SHARED, "messages": QUESTION, "max_tokens": 400, "temperature": 0}
    await mesh.make_ready(SHARED)
    async with mesh.client() as client:
        alone = await client.chat.completions.create(**asked, extra_headers={"X-GPUMesh-Node": "spare"})
        await mesh.gpumesh("drain", "spare")  # so that the pool is asked
        stream = await client.chat.completions.create(**asked, stream=True)
        said: list[str] = []
        async for chunk in stream:
            said += [choice.delta.content or "" for choice in chunk.choices]
            if len(said) == 50:
                await mesh.gpumesh("resume", "spare")
                await kill_worker(mesh)
    assert "".join(said) == alone.choices[0].message.content
    assert len("".join(said)) == asked["max_tokens"]
    await mesh.make_stopped(SHARED)


async def test_a_head_whose_network_is_lost_is_ended_by_its_guard(mesh: PoolMesh) -> None:
    """sshd is frozen, on both hosts: no end of a connection is ever seen there, only that no heartbeat comes."""
    await mesh.make_ready()
    frozen = {pid for host in mesh.hosts for pid in (host.listener, *host.sessions())}
    kill(frozen, signal.SIGSTOP)
    try:
        await mesh.wait_hosts_empty("after 20 s without a heartbeat")
    finally:
        kill(frozen, signal.SIGCONT)
    await mesh.wait_phase(PoolPhase.READY, starts=2)
    await asyncio.wait_for(mesh.wait_answer(MODEL), timeout=60)
    assert mesh.programs() == ONE_POOL
