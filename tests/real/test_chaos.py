"""Faults between a person and their GPU host, with real parts: OpenSSH's sshd in a network of its own, both transports
at the same time, another host that stays healthy, and clients that send requests all the time.

For each fault: it is noticed with its true reason, the tunnel comes back by itself on the same local port, no request
fails, and nothing is left behind. benchmarks/faults.py measures how quickly; the limits here are for a machine under
load.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.state import TunnelPhase
from tests.prerequisites import needs
from tests.real import process_resources
from tests.real.faults import FAULTS, VICTIMS, FaultSetup, InjectedFault, NetworkLine, NoticedBy, fault_setup, run_fault
from tests.real.process_resources import ProcessResources
from tests.real.warm_commands import warm_commands
from tests.tunnels.polling import alive, children, wait_until

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_network"),
    pytest.mark.timeout(180),
    needs("sshd", "ssh", "netns"),
]

NOTICE_S = 10.0
RECOVER_S = 30.0
CLIENTS = 4


def list_resources() -> tuple[int, int, list[str]]:
    """This process's descriptors, child processes, and threads without those of asyncio's pool."""
    mine = ProcessResources.of(os.getpid())
    names = sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))
    return mine.fds, mine.children, names


def is_no_more(now: tuple[int, int, list[str]], before: tuple[int, int, list[str]]) -> bool:
    """Whether no descriptor was added, and the children and threads are the same. Descriptors may be fewer: an earlier
    test's may be closed meanwhile."""
    return now[0] <= before[0] and now[1:] == before[1:]


@contextlib.asynccontextmanager
async def leaving_nothing(folder: Path, runtime: Path, *, line: NetworkLine | None = None) -> AsyncIterator[FaultSetup]:
    """A setup. After it, nothing of the mesh may be left: no process, thread, descriptor or file."""
    warm_commands()  # of which the hosts are forks; it stays until this process ends
    gc.collect()  # the garbage of an earlier test, which may hold descriptors, is not counted
    before = list_resources()
    async with fault_setup(folder, line=line, clients=CLIENTS) as setup:
        yield setup
        ours = {pid for zygote in process_resources.zygotes(os.getpid()) for pid in (zygote, *children(zygote))}
    await wait_until(lambda: is_no_more(list_resources(), before), f"{before} again")
    assert not [pid for pid in ours if alive(pid)]
    assert [path for path in runtime.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
async def test_a_fault_is_noticed_and_repaired_without_a_failed_request(
    fault: InjectedFault, tmp_path: Path, runtime: Path
) -> None:
    async with leaving_nothing(tmp_path, runtime, line=fault.line) as setup:
        results = await run_fault(setup, fault)
        # Nothing of the old connections is left, neither here nor at the host.
        await wait_until(lambda: len(process_resources.workers(os.getpid())) == len(VICTIMS), "no stale process here")
        await wait_until(lambda: setup.host.connections() == len(VICTIMS), "no stale connection at the host")
    for result in results:
        assert result.failures == (), result
        assert result.answers >= 20, result
        assert result.same_port, result
        if fault.noticed_by is NoticedBy.NOTHING:
            assert result.noticed_s is None, result
            assert result.reconnects == 0, result
            continue
        assert result.noticed_s is not None
        assert result.noticed_s <= NOTICE_S, result
        assert result.recovered_s is not None
        assert result.recovered_s <= RECOVER_S, result
        assert (result.reconnects > 0) == (fault.noticed_by is NoticedBy.TUNNEL), result


async def test_a_retry_does_not_accept_a_changed_host_key(tmp_path: Path, runtime: Path) -> None:
    """The tunnel is failed, and its hint names the command that accepts the key."""
    fault = next(fault for fault in FAULTS if fault.error_code == "host-key-changed")
    async with leaving_nothing(tmp_path, runtime) as setup:
        await fault.strike(setup)
        for node in VICTIMS:
            await setup.watch.wait(
                node, 0.0, lambda observation: observation.code == fault.error_code, within_s=NOTICE_S
            )
        retried_at = time.monotonic()
        setup.retry_tunnels()
        for node in VICTIMS:
            await setup.watch.wait(
                node, retried_at, lambda observation: observation.phase is TunnelPhase.CONNECTING, within_s=NOTICE_S
            )
            failed = await setup.watch.wait(
                node, retried_at, lambda observation: observation.phase is TunnelPhase.FAILED, within_s=NOTICE_S
            )
            assert failed.code == fault.error_code
            assert "gpumesh trust" in (setup.mesh.tunnel(node).state.hint or "")
            assert setup.watch.first(node, retried_at, lambda observation: observation.phase is TunnelPhase.UP) is None
