"""The request for one attempt: a node's address today, its secrets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gpumesh.errors import TunnelError
from gpumesh.topology import AddressCommand, TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import (
    FAILED,
    LONG_S,
    UP,
    both,
    supervised,
    wait_phase,
)
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


async def test_a_missing_secret_makes_the_tunnel_failed_and_is_named(
    sshd: Sshd, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUMESH_TEST_PASSWORD", raising=False)
    async with supervised(pool, sshd.spec(password_env="GPUMESH_TEST_PASSWORD"), 1) as watched:
        with pytest.raises(TunnelError, match="GPUMESH_TEST_PASSWORD"):
            await watched.tunnel.wait_up()
        assert watched.tunnel.state.error_code == "secret-missing"


@both
async def test_runpods_proxy_is_refused_by_its_name(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    """Also when address_from printed it. Nothing is sent to the proxy."""
    async with supervised(pool, sshd.spec(host="ssh.runpod.io", transport=transport), 1) as watched:
        with pytest.raises(TunnelError, match="terminals") as caught:
            await watched.tunnel.wait_up()
        assert caught.value.code == "transport-unsupported"
        assert "exposed TCP" in (caught.value.hint or "")
        assert watched.phase is FAILED
    asker = AddressCommand(("echo", "eu.ssh.runpod.io 22"))
    async with supervised(pool, sshd.spec(transport=transport, address_from=asker), 1) as watched:
        with pytest.raises(TunnelError, match="terminals"):
            await watched.tunnel.wait_up()


@both
async def test_the_address_command_runs_before_each_attempt(
    sshd: Sshd, pool: WorkerPool, backend: int, tmp_path: Path, transport: TransportKind
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = gone.getsockname()[1]
    answer, asked = tmp_path / "answer", tmp_path / "asked"
    answer.write_text("")  # the pod is still starting
    script = f"echo x >> {asked}; cat {answer}"
    ssh = sshd.spec(
        host="unused.invalid", transport=transport, address_from=AddressCommand(("sh", "-c", script)),
        keepalive_s=LONG_S,
    )  # fmt: skip
    async with supervised(pool, ssh, backend, client_wait_s=60.0) as watched:
        await wait_until(lambda: watched.tunnel.state.error_code == "host-unresolved", "the error of the empty answer")
        assert "address_from" in (watched.tunnel.state.last_error or "")
        answer.write_text(f"127.0.0.1 {dead}\n")
        await wait_until(lambda: watched.tunnel.state.error_code == "connect-refused", "the error of the dead address")
        answer.write_text(f'{{"host": "127.0.0.1", "port": {sshd.port}}}')
        await wait_phase(watched, UP)
        ports = watched.ports
        assert await exchange(ports[0], b"x") == b"x"
        count = len(asked.read_text().split())
        assert count >= 3
        # The pod restarts: another port, the same key on record for the node.
        await sshd.stop()
        sshd.port = 0
        await sshd.start()
        answer.write_text(f"127.0.0.1:{sshd.port}")
        await wait_until(lambda: watched.tunnel.state.reconnects == 1, "the connection to the new port")
        assert await exchange(ports[0], b"moved") == b"moved"
        assert len(asked.read_text().split()) > count
        assert FAILED not in watched.phases
