"""What a person has to mend before a tunnel comes up: keys, trust, forbidden forwarding, secrets."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from gpumesh.errors import AuthRefused
from gpumesh.topology import TransportKind
from gpumesh.tunnels.local_system import repairs
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, keygen
from tests.tunnels.supervised import (
    CONNECTING,
    FAILED,
    LONG_S,
    UP,
    both,
    supervised,
    wait_phase,
)
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@both
async def test_a_refused_key_makes_the_tunnel_failed_until_a_retry(
    sshd: Sshd, pool: WorkerPool, backend: int, tmp_path: Path, transport: TransportKind
) -> None:
    right = sshd.authorized_keys.read_text()
    sshd.authorized_keys.write_text(keygen(tmp_path / "other").with_suffix(".pub").read_text())
    async with supervised(pool, sshd.spec(transport=transport), backend) as watched:
        with pytest.raises(AuthRefused) as caught:
            await watched.tunnel.wait_up()
        assert caught.value.node == "iceland"
        state = watched.tunnel.state
        assert (state.state, state.error_code) == (FAILED, "auth-refused")
        assert state.retry_in_s is not None
        assert state.retry_in_s > 10
        assert state.hint
        with pytest.raises(ConnectionResetError):  # clients are reset at once: this state may last for days
            await exchange(watched.ports[0], b"x")
        sshd.authorized_keys.write_text(right)
        watched.tunnel.retry_now()
        await wait_phase(watched, UP)
        assert await exchange(watched.ports[0], b"x") == b"x"
        assert watched.phases == [CONNECTING, FAILED, CONNECTING, UP]


@both
async def test_a_changed_host_key_makes_the_tunnel_failed(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched:
        await watched.tunnel.wait_up()
        other = keygen(sshd.folder / "another").with_suffix(".pub").read_text()
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
        sshd.kill_sessions()
        await wait_phase(watched, FAILED)
        assert watched.tunnel.state.error_code == "host-key-changed"
        assert "trust" in (watched.tunnel.state.hint or "")


@both
async def test_a_key_that_somebody_records_wakes_the_tunnel(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gpumesh trust` of any mesh, ssh, or an editor: nobody tells this tunnel."""
    monkeypatch.setattr(repairs, "POLL_S", 0.02)
    right = sshd.known_hosts.read_text()
    sshd.known_hosts.write_text("")
    async with supervised(pool, sshd.spec(transport=transport), 1) as watched:
        await wait_phase(watched, FAILED)
        assert watched.tunnel.state.error_code == "host-key-unknown"
        sshd.known_hosts.write_text(f"other.example {sshd.public_host_key}\n")
        await wait_until(lambda: watched.phases == [CONNECTING, FAILED, CONNECTING, FAILED], "it is tried again")
        sshd.known_hosts.write_text(right)
        await wait_phase(watched, UP)
        assert watched.phases == [CONNECTING, FAILED, CONNECTING, FAILED, CONNECTING, UP]


@both
async def test_a_login_key_that_becomes_usable_wakes_the_tunnel(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "POLL_S", 0.02)
    missing = tmp_path / "missing"
    async with supervised(pool, sshd.spec(transport=transport, identity_files=(missing,)), 1) as watched:
        await wait_phase(watched, FAILED)
        assert watched.tunnel.state.error_code in ("key-unreadable", "auth-refused")
        os.replace(sshd.identity, missing)
        await wait_phase(watched, UP)


@both
async def test_a_host_that_forbids_forwarding_makes_the_tunnel_failed(
    tmp_path: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with (
        Sshd(tmp_path / "no", {"AllowTcpForwarding": "no"}) as sshd,
        supervised(pool, sshd.spec(transport=transport), backend) as watched,
    ):
        if transport is TransportKind.SSHTUNNEL:  # this transport learns it from the first client
            await watched.tunnel.wait_up()
            with pytest.raises(ConnectionResetError):
                await exchange(watched.ports[0], b"x")
        await wait_phase(watched, FAILED)
        assert watched.tunnel.state.error_code == "forwarding-forbidden"
        assert "AllowTcpForwarding" in (watched.tunnel.state.hint or "")


async def test_a_target_that_does_not_listen_leaves_the_tunnel_up(sshd: Sshd, pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with supervised(pool, sshd.spec(), port) as watched:
        await watched.tunnel.wait_up()
        with pytest.raises(ConnectionResetError):
            await exchange(watched.ports[0], b"x")
        assert (await watched.tunnel.exec(["true"], timeout_s=20)).exit_status == 0
        assert watched.phases == [CONNECTING, UP]


@both
async def test_the_time_of_a_persons_answer_does_not_count(
    sshd: Sshd, pool: WorkerPool, tmp_path: Path, transport: TransportKind
) -> None:
    """A person is asked for a key's passphrase, which no variable holds."""
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    prompts: list[tuple[str, str, bool]] = []

    async def prompter(node: str, text: str, *, echo: bool) -> str | None:
        prompts.append((node, text, echo))
        await asyncio.sleep(2.5)  # more than the time that connecting may take
        return "correct horse"

    spec = sshd.spec(transport=transport, identity_files=(locked,), connect_timeout_s=2.0)
    async with supervised(pool, spec, 1, prompter=prompter) as watched:
        await watched.tunnel.wait_up()
        assert len(prompts) == 1
        assert prompts[0][0] == "iceland"
        assert "locked" in prompts[0][1]
        assert prompts[0][2] is False
