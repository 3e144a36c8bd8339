"""What can be wrong when a pool is started: it is refused with the true reason, or tried again, and never called
healthy; nothing of it stays on any host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpumesh.pools.base import PoolPhase
from tests.prerequisites import needs
from tests.real.pools.pool_hosts import HEAD_PROGRAM, WORKER_PROGRAM, WorkerFault
from tests.real.pools.pool_mesh import HEAD, ONE_POOL, POOL, WORKER, PoolMesh, pool_entry, pool_mesh
from tests.tunnels.polling import wait_until

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
    needs("sshd", "llama-server", "openai"),
]

MODEL = "small"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_mesh(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> AsyncIterator[PoolMesh]:
    entries = [
        pool_entry(small_model),
        pool_entry("~/nowhere.gguf", name="no-model"),
        pool_entry("~/cut.gguf", name="cut-model"),
        pool_entry(small_model, name="too-big", context=2**20, split=None),
    ]
    async with pool_mesh(tmp_path_factory.mktemp("mesh"), entries) as made:
        (made.head.folder / "cut.gguf").write_bytes(small_model.read_bytes()[:700_000])
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(shared_mesh: PoolMesh) -> AsyncIterator[PoolMesh]:
    """After each test the pool is stopped, and the programs are as they should be."""
    yield shared_mesh
    for host in shared_mesh.hosts:
        host.repair_programs()
    await shared_mesh.make_stopped()


@pytest.mark.parametrize(
    ("host", "program"), [(HEAD, HEAD_PROGRAM), (WORKER, WORKER_PROGRAM)], ids=["of the head", "of the worker"]
)
async def test_a_missing_program_is_named_with_its_host(mesh: PoolMesh, host: str, program: str) -> None:
    machine = mesh.head if host == HEAD else mesh.worker
    (machine.programs / program).unlink()
    ended = await mesh.gpumesh("pool", "up", POOL, code=None)
    assert ended.code != 0, ended
    assert program in ended.err, ended
    assert host in ended.err, ended
    state = await mesh.state()
    assert state.phase is PoolPhase.FAILED, state
    assert state.hint, "how to install it"
    await mesh.wait_hosts_empty("after a refused start")
    machine.repair_programs()
    await mesh.make_ready()
    assert mesh.programs() == ONE_POOL


async def test_a_pool_whose_worker_ends_is_never_ready(mesh: PoolMesh) -> None:
    """llama-server starts without the worker, and says that it is healthy."""
    mesh.worker.break_worker(WorkerFault.ENDS)
    async with mesh.gpumesh.started("pool", "up", POOL):
        state = await mesh.wait_phase(PoolPhase.BACKOFF, PoolPhase.FAILED)
        assert WORKER in str(state.reason), state
        assert not await mesh.answers(MODEL)
    # Before it is mended, so that it is the start of the fault whose processes are looked for.
    await mesh.make_stopped()
    mesh.worker.repair_programs()
    await mesh.make_ready()
    await mesh.wait_answer(MODEL)


@pytest.mark.parametrize("fault", [WorkerFault.CLOSES, WorkerFault.SILENT])
async def test_a_pool_whose_worker_does_not_answer_is_never_ready(mesh: PoolMesh, fault: WorkerFault) -> None:
    """llama-server aborts if its worker closes the connection. If it gets no answer, it waits for ever. The start has
    half a minute, in which this test does nothing."""
    mesh.worker.break_worker(fault)
    async with mesh.gpumesh.started("pool", "up", POOL):
        state = await mesh.wait_phase(PoolPhase.BACKOFF, PoolPhase.FAILED)
        assert WORKER in str(state.reason), state
        assert not await mesh.answers(MODEL)
    await mesh.make_stopped()


@pytest.mark.parametrize("fault", [WorkerFault.OTHER_VERSION, WorkerFault.HIDDEN_VERSION])
async def test_another_version_is_refused(mesh: PoolMesh, fault: WorkerFault) -> None:
    """llama-server would start without the worker, and say that it is healthy."""
    mesh.worker.break_worker(fault)
    ended = await mesh.gpumesh("pool", "up", POOL, code=None)
    assert ended.code != 0, ended
    assert "3.9.9" in ended.err, ended
    assert "5.0.0" in ended.err, ended
    assert (await mesh.state()).phase is PoolPhase.FAILED
    await mesh.wait_hosts_empty("after a refused start")


@pytest.mark.parametrize(
    ("pool", "told"), [("no-model", "nowhere.gguf"), ("cut-model", "cut.gguf"), ("too-big", "MiB")], ids=str
)
async def test_what_cannot_run_is_refused_before_anything_starts(mesh: PoolMesh, pool: str, told: str) -> None:
    ended = await mesh.gpumesh("pool", "up", pool, code=None)
    assert ended.code != 0, ended
    assert told in ended.err, ended
    state = await mesh.state(pool)
    assert state.phase is PoolPhase.FAILED, state
    assert not mesh.programs()
    await mesh.gpumesh("pool", "down", pool)


async def test_two_commands_at_once_start_one_pool(mesh: PoolMesh) -> None:
    first, second = await asyncio.gather(*(mesh.gpumesh("pool", "up", POOL) for _ in range(2)))
    assert (first.code, second.code) == (0, 0)
    assert (await mesh.state()).starts == 1
    assert mesh.programs() == ONE_POOL


async def test_ctrl_c_while_it_starts_ends_it(mesh: PoolMesh) -> None:
    mesh.worker.break_worker(WorkerFault.SILENT)  # so that the start lasts
    async with mesh.gpumesh.terminal("pool", "up", POOL) as terminal:
        await wait_until(lambda: bool(mesh.head.pool_processes() or mesh.worker.pool_processes()), "it starts")
        terminal.press("\x03")
        assert await terminal.wait_exit() == 130, terminal.written
        assert terminal.is_restored() or "\x1b[?25l" not in terminal.written
    await mesh.wait_phase(PoolPhase.STOPPED)
    await mesh.wait_hosts_empty("after Ctrl-C")
