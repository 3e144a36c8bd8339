"""What goes wrong between a person and their GPU host, with real parts: OpenSSH's sshd in a network of its own, both
transports side by side, another host that stays well, and clients that ask all the time.

Of each fault: it is noticed with its true reason, the tunnel comes back by itself on the same local port, no request
fails, and nothing is left behind. How quickly is measured by benchmarks/faults.py; the bounds here are for a machine
that has other things to do.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.state import TunnelPhase
from tests.parts import needs
from tests.real import belongings
from tests.real.belongings import ProcessResources
from tests.real.faults import FAULTS, VICTIMS, FaultSetup, InjectedFault, NetworkLine, NoticedBy, fault_setup, run_fault
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


def held() -> tuple[int, int, list[str]]:
    """What this process has: descriptors, child processes, and threads, but for those of asyncio's own pool."""
    mine = ProcessResources.of(os.getpid())
    names = sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))
    return mine.fds, mine.children, names


@contextlib.asynccontextmanager
async def leaving_nothing(folder: Path, runtime: Path, *, line: NetworkLine | None = None) -> AsyncIterator[FaultSetup]:
    """A stage; when it is taken down, nothing is left of the mesh: no process, thread, descriptor or file."""
    before = held()
    async with fault_setup(folder, line=line) as stage:
        yield stage
        ours = {pid for zygote in belongings.zygotes(os.getpid()) for pid in (zygote, *children(zygote))}
    await wait_until(lambda: held() == before, f"{before} again")
    assert not [pid for pid in ours if alive(pid)]
    assert [path for path in runtime.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
async def test_a_fault_is_noticed_and_mended_and_no_client_sees_it(
    fault: InjectedFault, tmp_path: Path, runtime: Path
) -> None:
    async with leaving_nothing(tmp_path, runtime, line=fault.line) as stage:
        results = await run_fault(stage, fault)
        # Whatever was there of the old connections is gone, here and at the host.
        await wait_until(lambda: len(belongings.workers(os.getpid())) == len(VICTIMS), "no stale process here")
        await wait_until(lambda: stage.host.connections() == len(VICTIMS), "no stale connection at the host")
    for result in results:
        assert result.failures == (), result
        assert result.answers >= 20, result
        assert result.same_port, result
        if fault.noticed_by is NoticedBy.NOBODY:
            assert result.noticed_s is None, result
            assert result.reconnects == 0, result
            continue
        assert result.noticed_s is not None
        assert result.noticed_s <= NOTICE_S, result
        assert result.recovered_s is not None
        assert result.recovered_s <= RECOVER_S, result
        assert (result.reconnects > 0) == (fault.noticed_by is NoticedBy.TUNNEL), result


async def test_a_changed_host_key_is_not_accepted_by_trying_again(tmp_path: Path, runtime: Path) -> None:
    """It is failed, and says which command accepts the key."""
    fault = next(fault for fault in FAULTS if fault.error_code == "host-key-changed")
    async with leaving_nothing(tmp_path, runtime) as stage:
        await fault.strike(stage)
        for node in VICTIMS:
            await stage.watch.wait(node, 0.0, lambda seen: seen.code == fault.error_code, within_s=NOTICE_S)
        again = time.monotonic()
        stage.nudge()
        for node in VICTIMS:
            await stage.watch.wait(node, again, lambda seen: seen.phase is TunnelPhase.CONNECTING, within_s=NOTICE_S)
            failed = await stage.watch.wait(
                node, again, lambda seen: seen.phase is TunnelPhase.FAILED, within_s=NOTICE_S
            )
            assert failed.code == fault.error_code
            assert "gpumesh trust" in (stage.mesh.tunnel(node).state.hint or "")
            assert stage.watch.first(node, again, lambda seen: seen.phase is TunnelPhase.UP) is None
