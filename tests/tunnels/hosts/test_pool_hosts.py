"""What pools need of a host, on other hosts than Linux with OpenSSH and bash: programs, and ports that lead here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpumesh.topology import TransportKind
from gpumesh.tunnels.transport import ReverseForward
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.hosts.visit import Host, running, spec_for
from tests.tunnels.sshd import port_of_this_worker
from tests.tunnels.supervised import supervised, wait_reconnects
from tests.tunnels.test_programs import GUARD, start_guard, wait_dead
from tests.tunnels.test_reverse_forwards import addresses_of_listeners
from tests.tunnels.traffic import exchange

pytestmark = pytest.mark.real

HOSTS = (
    Host("dropbear", dropbear=True, needs=("dropbear",)),
    Host("tcsh", shell="tcsh", needs=("tcsh",)),
)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("host", [pytest.param(host, id=host.name, marks=needs(*host.needs)) for host in HOSTS])
async def test_programs_and_ports(host: Host, tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int) -> None:
    del runtime
    async with running(host, tmp_path) as (_account, server):
        for transport in TransportKind:
            reverse = ReverseForward(port_of_this_worker(), backend)
            ssh = spec_for(host, server, transport)
            async with supervised(pool, ssh, 1, reverse=[reverse]) as watched:
                async with asyncio.timeout(40):
                    await watched.tunnel.wait_up()
                assert set(addresses_of_listeners(reverse.remote_port)) <= {"127.0.0.1", "::1"}
                assert await exchange(reverse.remote_port, b"hello") == b"hello"
                program, pids = await start_guard(watched.tunnel.open_program(["sh", "-c", GUARD]))
                await program.close()
                await wait_dead(pids)
                program, pids = await start_guard(watched.tunnel.open_program(["sh", "-c", GUARD]))
                with watched.tunnel.held_closed():
                    await wait_dead(pids)
                await wait_reconnects(watched, 1)
                assert await exchange(reverse.remote_port, b"back") == b"back"
