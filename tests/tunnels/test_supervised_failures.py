"""What a person has to mend before a tunnel comes up: keys, trust, forbidden forwarding, secrets."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from gpumesh.errors import AuthRefused, TunnelError
from gpumesh.topology import TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.parts import needs
from tests.tunnels.sshd import Sshd, keygen
from tests.tunnels.supervised import (
    CONNECTING,
    FAILED,
    LONG_S,
    UP,
    both,
    supervised,
    until_phase,
)
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@both
async def test_a_refused_key_is_failed_until_it_is_nudged(
    sshd: Sshd, pool: WorkerPool, backend: int, tmp_path: Path, transport: TransportKind
) -> None:
    right = sshd.authorized_keys.read_text()
    sshd.authorized_keys.write_text(keygen(tmp_path / "other").with_suffix(".pub").read_text())
    async with supervised(pool, sshd.spec(transport=transport), backend) as one:
        with pytest.raises(AuthRefused) as caught:
            await one.tunnel.wait_up()
        assert caught.value.node == "iceland"
        state = one.tunnel.state
        assert (state.state, state.error_code) == (FAILED, "auth-refused")
        assert state.retry_in_s is not None
        assert state.retry_in_s > 10
        assert state.hint
        with pytest.raises(ConnectionResetError):  # at once: this may last for days
            await exchange(one.ports[0], b"x")
        sshd.authorized_keys.write_text(right)
        one.tunnel.retry_now()
        await until_phase(one, UP)
        assert await exchange(one.ports[0], b"x") == b"x"
        assert one.phases == [CONNECTING, FAILED, CONNECTING, UP]


@both
async def test_a_changed_host_key_is_failed(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as one:
        await one.tunnel.wait_up()
        other = keygen(sshd.folder / "another").with_suffix(".pub").read_text()
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
        sshd.kill_sessions()
        await until_phase(one, FAILED)
        assert one.tunnel.state.error_code == "host-key-changed"
        assert "trust" in (one.tunnel.state.hint or "")


@both
async def test_a_host_that_forbids_forwarding_is_failed(
    tmp_path: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with (
        Sshd(tmp_path / "no", {"AllowTcpForwarding": "no"}) as sshd,
        supervised(pool, sshd.spec(transport=transport), backend) as one,
    ):
        if transport is TransportKind.SSHTUNNEL:  # which learns it from the first client
            await one.tunnel.wait_up()
            with pytest.raises(ConnectionResetError):
                await exchange(one.ports[0], b"x")
        await until_phase(one, FAILED)
        assert one.tunnel.state.error_code == "forwarding-forbidden"
        assert "AllowTcpForwarding" in (one.tunnel.state.hint or "")


async def test_a_target_that_is_not_there_is_no_fault_of_the_tunnel(sshd: Sshd, pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with supervised(pool, sshd.spec(), port) as one:
        await one.tunnel.wait_up()
        with pytest.raises(ConnectionResetError):
            await exchange(one.ports[0], b"x")
        assert (await one.tunnel.exec(["true"], timeout_s=20)).exit_status == 0
        assert one.phases == [CONNECTING, UP]


@both
async def test_a_person_is_asked_and_not_hurried(
    sshd: Sshd, pool: WorkerPool, tmp_path: Path, transport: TransportKind
) -> None:
    """Transport openssh asks for a key's passphrase; the other takes it from a variable only."""
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    asked: list[tuple[str, str, bool]] = []

    async def ask(node: str, text: str, *, echo: bool) -> str | None:
        asked.append((node, text, echo))
        await asyncio.sleep(1.5)  # more than the time that connecting may take
        return "correct horse"

    spec = sshd.spec(transport=transport, identity_files=(locked,), connect_timeout_s=1.0)
    async with supervised(pool, spec, 1, ask=ask) as one:
        if transport is TransportKind.OPENSSH:
            await one.tunnel.wait_up()
            assert len(asked) == 1
            assert asked[0][0] == "iceland"
            assert "locked" in asked[0][1]
            assert asked[0][2] is False
        else:
            with pytest.raises(TunnelError, match="passphrase"):
                await one.tunnel.wait_up()
