"""A pool loses its parts again and again: the mesh keeps no resource of those that are gone, and leaves nothing on a
host, also when it is killed itself."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gpumesh.pools.base import PoolPhase
from tests.prerequisites import needs
from tests.real.pools.pool_hosts import HEAD_PROGRAM, WORKER_PROGRAM
from tests.real.pools.pool_mesh import ONE_POOL, POOL, PoolMesh, pool_entry, pool_mesh
from tests.real.process_resources import ProcessResources, zygotes
from tests.tunnels.polling import alive, wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240), needs("sshd", "llama-server")]

# Each part that can be lost about seven times. GPUMESH_TEST_POOL_CYCLES runs another number of them.
CYCLES, WARM_UP = int(os.environ.get("GPUMESH_TEST_POOL_CYCLES", "20")), 3
# The first thirty cycles add about 7 MiB, mostly what Python keeps; the next forty only 0.3 MiB.
GROWTH_KIB = 8 * 1024


def resources(mesh: PoolMesh) -> tuple[ProcessResources, ...]:
    """Those of the mesh's process and of the zygote of its tunnels."""
    leader = mesh.gpumesh.leader()
    return tuple(ProcessResources.of(pid) for pid in (leader, *zygotes(leader)))


async def kill_and_recover(mesh: PoolMesh, number: int) -> None:
    """Kills a part of the pool and waits until the pool is ready again."""
    old = {*mesh.head.pool_processes(), *mesh.worker.pool_processes()}
    match number % 3:
        case 0:
            mesh.worker.kill_program(WORKER_PROGRAM)
        case 1:
            mesh.head.kill_program(HEAD_PROGRAM)
        case _:
            await mesh.worker.cut_sessions()
    await wait_until(lambda: not any(map(alive, old)), "what was left of the pool ends")
    # It does not wait for the end of a backoff, which is long after so many losses.
    await mesh.gpumesh("pool", "up", POOL)
    assert mesh.programs() == ONE_POOL


async def test_losses_leave_nothing_behind(tmp_path: Path, small_model: Path) -> None:
    async with pool_mesh(tmp_path, [pool_entry(small_model)]) as mesh:
        await mesh.make_ready()
        for number in range(WARM_UP):
            await kill_and_recover(mesh, number)
        before = resources(mesh)
        for number in range(CYCLES):
            await kill_and_recover(mesh, number)
        await wait_until(
            lambda: [now.countable for now in resources(mesh)] == [then.countable for then in before],
            f"{before} again, not {resources(mesh)}",
        )
        for now, then in zip(resources(mesh), before, strict=True):
            assert now.rss_kib - then.rss_kib < GROWTH_KIB
        await mesh.wait_answer("small")
        await _kill_the_mesh(mesh)


async def _kill_the_mesh(mesh: PoolMesh) -> None:
    """kill -9 of all its processes: nothing stays on a host, and the next mesh can start the pool."""
    assert mesh.programs() == ONE_POOL
    os.kill(mesh.gpumesh.leader(), signal.SIGKILL)
    await mesh.wait_hosts_empty("after kill -9 of the mesh")
    await wait_until(lambda: not mesh.gpumesh.processes(), "all processes of the mesh have ended")
    await mesh.start()
    assert (await mesh.state()).phase is PoolPhase.STOPPED
    await asyncio.wait_for(mesh.make_ready(), timeout=60)
    assert mesh.programs() == ONE_POOL
