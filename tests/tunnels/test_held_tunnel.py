"""A tunnel that is held closed, over both transports and a real sshd: cut as by a crash, and open again after."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpumesh.errors import TunnelDown
from gpumesh.topology import TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import BACKOFF, both, descendants, supervised, wait_phase
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@both
async def test_it_is_cut_stays_closed_and_opens_again(
    sshd: Sshd, pool: WorkerPool, backend: int, runtime: Path, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport), backend) as watched:
        tunnel = watched.tunnel
        await tunnel.wait_up()
        (port,) = watched.ports
        assert await exchange(port, b"before") == b"before"
        with tunnel.held_closed():
            await wait_phase(watched, BACKOFF)
            assert tunnel.state.retry_in_s is None
            assert "ended unexpectedly" in (tunnel.state.last_error or "")
            await wait_until(lambda: not sshd.children(), "the end of sshd's session")
            assert pool.zygote_pid is not None
            await wait_until(lambda: not descendants(pool.zygote_pid or 0), "the end of the worker")
            with pytest.raises(TunnelDown), tunnel.held_closed():
                pass
            client = asyncio.create_task(exchange(port, b"waits"))  # a short outage is only a delay
        await tunnel.wait_up()
        assert await client == b"waits"
        assert tunnel.state.reconnects == 1
    assert list(runtime.glob("gpumesh/*")) == []
