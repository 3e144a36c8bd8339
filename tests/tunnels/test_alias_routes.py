"""Hosts that ``~/.ssh/config`` describes, from mesh.yaml to the login, on both transports, as ssh reaches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.topology import HostKeyPolicy, SshSpec, TransportKind
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.transports import load_connect
from tests.prerequisites import needs
from tests.tunnels.logging_in import read_spec
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, keygen, run_agent

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "home", classmethod(lambda _cls: tmp_path))
    (tmp_path / ".ssh").mkdir(mode=0o700)
    return tmp_path


async def log_in(ssh: SshSpec, folder: Path) -> None:
    request = ConnectRequest("n", ssh, (), control_dir=str(folder))
    connection = await load_connect(ssh.transport)(request, (), RecordedEvents())
    try:
        assert await connection.ping(10.0) is not None
    finally:
        await connection.close()
        for path in folder.iterdir():
            path.unlink()


def host_lines(name: str, sshd: Sshd) -> str:
    return (
        f"Host {name}\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.spec().user}\n"
        f"  IdentityFile {sshd.identity}\n  IdentitiesOnly yes\n  UserKnownHostsFile {sshd.known_hosts}\n"
    )


@pytest.mark.parametrize("named_in", ["~/.ssh/config", "mesh.yaml"])
async def test_a_jump_host_has_its_own_key_and_known_hosts(
    named_in: str, transport: TransportKind, sshd: Sshd, folder: Path, home: Path
) -> None:
    async with Sshd(home / "jump") as jump:
        jump_line = "  ProxyJump bastion\n" if named_in == "~/.ssh/config" else ""
        text = host_lines("gpu", sshd) + jump_line + host_lines("bastion", jump)
        own_jump = "" if jump_line else ", proxy_jump: bastion"
        await log_in(read_spec(home, f"{{alias: gpu, transport: {transport}{own_jump}}}", text), folder)
        assert "Accepted publickey" in jump.log()


async def test_a_key_of_a_jump_host_is_tried_although_the_agent_has_too_many(
    transport: TransportKind, sshd: Sshd, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Sshd(home / "jump", {"MaxAuthTries": "2"}) as jump:
        text = (host_lines("gpu", sshd) + "  ProxyJump bastion\n" + host_lines("bastion", jump)).replace(
            "  IdentitiesOnly yes\n", ""
        )
        with run_agent(home, *(keygen(home / f"other{number}") for number in range(3))) as agent:
            monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
            await log_in(read_spec(home, f"{{alias: gpu, transport: {transport}}}", text), folder)


async def test_the_host_key_may_be_in_any_of_the_files(
    transport: TransportKind, sshd: Sshd, folder: Path, home: Path
) -> None:
    (home / "empty").touch()
    sshd.known_hosts.rename(home / "known hosts")
    files = f'{home}/missing {home}/empty "{home}/known hosts"'
    text = host_lines("gpu", sshd).replace(str(sshd.known_hosts), files)
    await log_in(read_spec(home, f"{{alias: gpu, transport: {transport}}}", text), folder)


async def test_new_keys_are_accepted_where_ssh_accepts_them(
    transport: TransportKind, sshd: Sshd, folder: Path, home: Path
) -> None:
    known_hosts = home / "new"
    text = host_lines("gpu", sshd).replace(str(sshd.known_hosts), str(known_hosts))
    ssh = read_spec(home, f"{{alias: gpu, transport: {transport}}}", text + "  StrictHostKeyChecking no\n")
    await log_in(ssh, folder)
    assert sshd.public_host_key in known_hosts.read_text()
    own = read_spec(home, "{alias: gpu, host_key_policy: strict}", text + "  StrictHostKeyChecking no\n")
    assert own.host_key_policy is HostKeyPolicy.STRICT
