"""Which targets a host allows, and what is reported of the others."""

from __future__ import annotations

import contextlib
import shutil
import socket
from pathlib import Path

import pytest

from gpumesh.topology import Target
from tests.tunnels.openssh.connecting import connect_error, connected
from tests.tunnels.polling import wait_until
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]


async def test_forwarding_forbidden(tmp_path: Path, folder: Path) -> None:
    async with Sshd(tmp_path / "no", {"AllowTcpForwarding": "no"}) as sshd:
        error = await connect_error(sshd.spec(), folder)
    assert error.code == "forwarding-forbidden"
    assert "sshd_config" in (error.hint or "")


async def test_forwarding_allowed_to_one_of_two(tmp_path: Path, folder: Path) -> None:
    events = RecordedEvents()
    async with serving(echo) as good, serving(echo) as bad:
        async with (
            Sshd(tmp_path / "some", {"PermitOpen": f"127.0.0.1:{good}"}) as sshd,
            connected(sshd.spec(), folder, good, bad, events=events) as (_, (local, _other)),
        ):
            assert await exchange(local, b"hello") == b"hello"
        assert events.forward_failures == [(Target("127.0.0.1", bad), "forwarding-forbidden")]


async def test_a_backend_that_does_not_listen_is_reported(sshd: Sshd, folder: Path) -> None:
    events = RecordedEvents()
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    async with connected(sshd.spec(), folder, port, events=events) as (_, (local,)):
        with contextlib.suppress(ConnectionError):
            assert await exchange(local, b"x") == b""
        await wait_until(lambda: bool(events.forward_failures), "the report")
    assert events.forward_failures == [(Target("127.0.0.1", port), "backend-unreachable")]
