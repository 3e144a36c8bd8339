"""The ways of a pool's data other than through this machine's connections: the head's host logs in to the worker, and
this machine is the head itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpumesh.pools.base import PathKind
from tests.prerequisites import needs
from tests.real.pools.pool_hosts import HEAD_PROGRAM, WORKER_PROGRAM, real_program
from tests.real.pools.pool_mesh import ONE_POOL, WORKER, PoolMesh, pool_entry, pool_mesh
from tests.tunnels.polling import wait_until

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
    needs("sshd", "ssh", "llama-server"),
]

MODEL = "small"
HERE, HERE_POOL = "here", "local"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> AsyncIterator[PoolMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    here = {"name": HERE, "backend": {"kind": "ollama", "url": "http://127.0.0.1:1"}}
    members = [{"node": name, "memory": "256MiB"} for name in (HERE, WORKER)]
    programs = real_program(HEAD_PROGRAM).parent
    entries = [
        pool_entry(small_model),
        pool_entry(small_model, name=HERE_POOL, nodes=members, head=HERE, llama_cpp_dir=str(programs)),
    ]
    async with pool_mesh(folder, entries, extra_nodes=[here], head_may_log_in=True) as made:
        yield made


async def test_the_head_logs_in_to_the_worker(mesh: PoolMesh) -> None:
    state = await mesh.make_ready()
    (path,) = [member.path for member in state.members if member.node == WORKER]
    assert path is not None
    assert path.kind is PathKind.HEAD_TO_WORKER, state
    await mesh.wait_answer(MODEL)
    programs = {socket.program for socket in mesh.head.listening()}
    assert programs == {HEAD_PROGRAM, "ssh"}, "no port of our own connections is in use"
    assert all(socket.is_loopback for host in mesh.hosts for socket in host.listening())
    assert mesh.programs() == ONE_POOL
    await mesh.make_stopped()
    await wait_until(lambda: not [text for text in mesh.head.processes().values() if text.startswith("ssh ")], "no ssh")


async def test_this_machine_is_the_head(mesh: PoolMesh) -> None:
    before = mesh.gpumesh.listening()
    state = await mesh.make_ready(HERE_POOL)
    assert {member.node for member in state.members} == {HERE, WORKER}
    await mesh.wait_answer(MODEL)
    assert mesh.programs() == {f"{WORKER} {WORKER_PROGRAM}": 1}
    assert len(mesh.gpumesh.listening() - before) >= 1
    await mesh.make_stopped(HERE_POOL)
    await wait_until(lambda: mesh.gpumesh.listening() == before, "nothing listens here any more")
