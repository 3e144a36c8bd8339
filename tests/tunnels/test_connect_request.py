"""The request for one attempt: a node's address today, its secrets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gpumesh.errors import TunnelError
from gpumesh.topology import AddressCommand, TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.parts import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import (
    FAILED,
    LONG_S,
    UP,
    both,
    supervised,
    until_phase,
)
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


async def test_a_missing_secret_is_failed_and_named(
    sshd: Sshd, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUMESH_TEST_PASSWORD", raising=False)
    async with supervised(pool, sshd.spec(password_env="GPUMESH_TEST_PASSWORD"), 1) as one:
        with pytest.raises(TunnelError, match="GPUMESH_TEST_PASSWORD"):
            await one.tunnel.wait_up()
        assert one.tunnel.state.error_code == "secret-missing"


@both
async def test_runpods_proxy_is_refused_by_its_name(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    """Also where a command gave it; nothing is sent to it."""
    async with supervised(pool, sshd.spec(host="ssh.runpod.io", transport=transport), 1) as one:
        with pytest.raises(TunnelError, match="terminals") as caught:
            await one.tunnel.wait_up()
        assert caught.value.code == "transport-unsupported"
        assert "exposed TCP" in (caught.value.hint or "")
        assert one.phase is FAILED
    asker = AddressCommand(("echo", "eu.ssh.runpod.io 22"))
    async with supervised(pool, sshd.spec(transport=transport, address_from=asker), 1) as one:
        with pytest.raises(TunnelError, match="terminals"):
            await one.tunnel.wait_up()


@both
async def test_the_address_is_asked_for_again_when_a_connect_failed(
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
    async with supervised(pool, ssh, backend, grace_s=60.0) as one:
        await wait_until(lambda: one.tunnel.state.error_code == "host-unresolved", "the empty answer told")
        assert "address_from" in (one.tunnel.state.last_error or "")
        answer.write_text(f"127.0.0.1 {dead}\n")
        await wait_until(lambda: one.tunnel.state.error_code == "connect-refused", "the dead address told")
        answer.write_text(f'{{"host": "127.0.0.1", "port": {sshd.port}}}')
        await until_phase(one, UP)
        ports = one.ports
        assert await exchange(ports[0], b"x") == b"x"
        count = len(asked.read_text().split())
        assert count >= 3
        # The pod restarts: another port, the same key on record for the node.
        await sshd.stop()
        sshd.port = 0
        await sshd.start()
        answer.write_text(f"127.0.0.1:{sshd.port}")
        await wait_until(lambda: one.tunnel.state.reconnects == 1, "it is found at its new port")
        assert await exchange(ports[0], b"moved") == b"moved"
        assert len(asked.read_text().split()) > count
        assert FAILED not in one.phases
