"""`gpumesh trust`, the installed command, against real OpenSSH servers."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.daemon.control_socket.server import ControlServer
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.paths import for_config
from gpumesh.errors import ExitCode
from gpumesh.tunnels.known_hosts import host_key_alias, read_known_hosts
from tests.daemon.scripted import ScriptedSession
from tests.prerequisites import needs
from tests.real.command import Gpumesh
from tests.tunnels.sshd import Sshd, keygen

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

transports = pytest.mark.parametrize("transport", ["sshtunnel", "openssh"])


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "DEBUG1"}) as sshd:
        sshd.known_hosts.write_text("")
        yield sshd


def write(gpumesh: Gpumesh, sshd: Sshd, **ssh: Any) -> None:
    entry = {"host": "127.0.0.1", "port": sshd.port, "user": sshd.spec().user, "known_hosts": str(sshd.known_hosts)}
    entry |= {"identity_file": str(sshd.identity), "agent": False, **ssh}
    document = {"version": 1, "nodes": [{"name": "iceland", "ssh": entry}]}
    gpumesh.config.write_text(json.dumps(document))


def fingerprint(public: Path) -> str:
    """By OpenSSH's own tool."""
    said = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True, timeout=20)
    return said.stdout.split()[1]


def own_name(gpumesh: Gpumesh) -> str:
    """The name of the node in its mesh, as it is in known_hosts."""
    return host_key_alias("iceland", str(gpumesh.config.resolve()))


def names(known_hosts: Path) -> list[str]:
    return [entry.hosts for entry in read_known_hosts(known_hosts).entries]


@transports
async def test_a_new_key(gpumesh: Gpumesh, sshd: Sshd, transport: str) -> None:
    write(gpumesh, sshd, transport=transport)
    unasked = await gpumesh("trust", "iceland", code=ExitCode.USAGE)
    assert "--yes" in unasked.err
    assert sshd.known_hosts.read_text() == ""
    ended = await gpumesh("trust", "--yes", "iceland")
    shown = fingerprint(sshd.host_key.with_suffix(".pub"))
    assert ended.out == f"iceland  [127.0.0.1]:{sshd.port}  ssh-ed25519 {shown}  new\n"
    assert "Nothing is on record" in ended.err
    assert "ssh_host_ed25519_key.pub" in ended.err
    assert names(sshd.known_hosts) == [own_name(gpumesh), f"[127.0.0.1]:{sshd.port}"]
    again = await gpumesh("trust", "iceland")
    assert again.out.endswith("  known\n")
    assert again.err == ""
    # Only looked at: nobody has tried to log in.
    assert "Accepted publickey" not in sshd.log()


@transports
async def test_a_changed_key_and_what_that_means(gpumesh: Gpumesh, sshd: Sshd, transport: str) -> None:
    write(gpumesh, sshd, transport=transport)
    old = keygen(sshd.folder / "old").with_suffix(".pub")
    kept = f"other.example {' '.join(old.read_text().split()[:2])}\n"
    sshd.known_hosts.write_text(f"{own_name(gpumesh)},other.example {old.read_text()}")
    ended = await gpumesh("trust", "-y", "iceland")
    assert ended.out.endswith("  CHANGED\n")
    assert f"on record in {sshd.known_hosts}: ssh-ed25519 {fingerprint(old)}" in ended.err
    assert "pod was reset" in ended.err
    assert "in between" in ended.err
    assert sshd.known_hosts.read_text().startswith(kept)  # that of another host is none of our business
    assert (await gpumesh("trust", "iceland")).out.endswith("  known\n")


async def test_a_key_that_is_known_by_its_address_is_kept_for_the_node_too(gpumesh: Gpumesh, sshd: Sshd) -> None:
    """So that it is known when it comes back elsewhere."""
    write(gpumesh, sshd)
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {sshd.public_host_key}\n")
    ended = await gpumesh("trust", "iceland")
    assert ended.out.endswith("  known\n")
    assert "wherever it moves" in ended.err
    assert own_name(gpumesh) in names(sshd.known_hosts)
    await sshd.stop()
    sshd.port = 0
    recorded = sshd.known_hosts.read_text()
    await sshd.start()
    sshd.known_hosts.write_text(recorded)
    write(gpumesh, sshd)
    assert (await gpumesh("trust", "iceland")).out.endswith("  known\n")


async def test_the_key_of_a_node_of_another_mesh_is_left_alone(gpumesh: Gpumesh, sshd: Sshd) -> None:
    """An earlier version has recorded it for the nodes of this name in all meshes."""
    write(gpumesh, sshd)
    old = keygen(sshd.folder / "old").with_suffix(".pub")
    other_node = f"{host_key_alias('iceland')} {' '.join(old.read_text().split()[:2])}\n"
    sshd.known_hosts.write_text(other_node)
    ended = await gpumesh("trust", "-y", "iceland")
    assert ended.out.endswith("  CHANGED\n")
    assert "An earlier version has recorded that key for a node 'iceland' of any mesh" in ended.err
    assert sshd.known_hosts.read_text().startswith(other_node), "its own mesh still relies on it"
    assert names(sshd.known_hosts)[1:] == [own_name(gpumesh), f"[127.0.0.1]:{sshd.port}"]
    assert (await gpumesh("trust", "iceland")).out.endswith("  known\n")


async def test_hashed_names_stay_hashed(gpumesh: Gpumesh, sshd: Sshd) -> None:
    write(gpumesh, sshd)
    sshd.known_hosts.write_text(f"somewhere.example {sshd.public_host_key}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", sshd.known_hosts], check=True, capture_output=True, timeout=20)
    await gpumesh("trust", "-y", "iceland")
    assert all(name.startswith("|1|") for name in names(sshd.known_hosts))
    assert (await gpumesh("trust", "iceland")).out.endswith("  known\n")


@transports
async def test_a_revoked_key_is_not_recorded(gpumesh: Gpumesh, sshd: Sshd, transport: str) -> None:
    write(gpumesh, sshd, transport=transport)
    sshd.known_hosts.write_text(f"@revoked * {sshd.public_host_key}\n")
    before = sshd.known_hosts.read_text()
    ended = await gpumesh("trust", "-y", "iceland", code=ExitCode.FAILED)
    assert ended.out.endswith("  revoked\n")
    assert "@revoked" in ended.err
    assert sshd.known_hosts.read_text() == before


@transports
async def test_the_kind_of_key_on_record_is_asked_for(gpumesh: Gpumesh, tmp_path: Path, transport: str) -> None:
    """A host with two keys has not changed because it would rather show the other."""
    sshd = Sshd(tmp_path / "two", {"LogLevel": "INFO"})
    rsa = keygen(sshd.folder / "rsa", kind="rsa")
    sshd.options["HostKey"] = f"{sshd.host_key}\nHostKey {rsa}"
    async with sshd:
        sshd.known_hosts.write_text(f"gpumesh-node-iceland {rsa.with_suffix('.pub').read_text()}")
        write(gpumesh, sshd, transport=transport)
        ended = await gpumesh("trust", "iceland")
        assert ended.out == f"iceland  [127.0.0.1]:{sshd.port}  ssh-rsa {fingerprint(rsa.with_suffix('.pub'))}  known\n"


@transports
async def test_jump_hosts_come_first(gpumesh: Gpumesh, sshd: Sshd, tmp_path: Path, transport: str) -> None:
    async with Sshd(tmp_path / "jump", {"LogLevel": "INFO"}) as jump:
        jump.authorized_keys.write_text(sshd.identity.with_suffix(".pub").read_text())
        write(gpumesh, sshd, transport=transport, proxy_jump=f"{sshd.spec().user}@127.0.0.1:{jump.port}")
        ended = await gpumesh("trust", "-y", "iceland")
        first, second = ended.out.splitlines()
        assert first.startswith(f"iceland (jump host)  [127.0.0.1]:{jump.port}  ssh-ed25519 SHA256:")
        assert second.startswith(f"iceland  [127.0.0.1]:{sshd.port}  ssh-ed25519 SHA256:")
        assert first.endswith("  new")
        assert names(sshd.known_hosts) == [
            f"[127.0.0.1]:{jump.port}", own_name(gpumesh), f"[127.0.0.1]:{sshd.port}",
        ]  # fmt: skip
        again = await gpumesh("trust", "iceland")
        assert again.out == second.replace("  new", "  known") + "\n"


@transports
async def test_what_cannot_be_asked_is_said(gpumesh: Gpumesh, sshd: Sshd, transport: str) -> None:
    write(gpumesh, sshd, transport=transport)
    await sshd.stop()
    ended = await gpumesh("trust", "iceland", code=ExitCode.FAILED)
    assert str(sshd.port) in ended.err
    assert "nothing listens" in ended.err
    assert "there is no node" in (await gpumesh("trust", "nobody", code=ExitCode.USAGE)).err
    gpumesh.config.write_text("nodes: [{name: local, backend: {url: 'http://127.0.0.1:1'}}]\n")
    assert "no host key" in (await gpumesh("trust", "local", code=ExitCode.USAGE)).err


async def test_a_person_is_asked(gpumesh: Gpumesh, sshd: Sshd) -> None:
    write(gpumesh, sshd)
    async with gpumesh.terminal("trust", "iceland") as seen:
        await seen.wait_for_text("Is this the right fingerprint?")
        seen.press("n\n")
        assert await seen.wait_exit() == 1
        assert "is not recorded, since you said that it is not the right one" in seen.plain_text
    assert sshd.known_hosts.read_text() == ""
    async with gpumesh.terminal("trust", "iceland") as seen:
        await seen.wait_for_text("Is this the right fingerprint?")
        seen.press("y\n")
        assert await seen.wait_exit() == 0
    assert own_name(gpumesh) in names(sshd.known_hosts)


async def test_the_running_mesh_connects_at_once(gpumesh: Gpumesh, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gpumesh, sshd)
    monkeypatch.setenv("XDG_RUNTIME_DIR", gpumesh.environment()["XDG_RUNTIME_DIR"])
    paths = for_config(gpumesh.config)
    session = ScriptedSession()
    lock = MeshLock.acquire(paths)
    try:
        async with ControlServer(session, paths.socket, on_stop=lambda _: None):
            await gpumesh("trust", "-y", "iceland")
            assert session.reconnected == ["iceland"]
            await gpumesh("trust", "iceland")
            assert session.reconnected == ["iceland", "iceland"], "a person waits for it, also if the key was known"
            session.state = replace(session.state, nodes=())
            await gpumesh("trust", "iceland")
            assert len(session.reconnected) == 2, "the running mesh may have been started without the node"
    finally:
        lock.release()


@pytest.mark.slow
@transports
async def test_trust_brings_the_node_of_a_running_mesh_back(gpumesh: Gpumesh, sshd: Sshd, transport: str) -> None:
    write(gpumesh, sshd, transport=transport)
    document = json.loads(gpumesh.config.read_text())
    gpumesh.config.write_text(json.dumps({**document, "gateway": {"listen": "127.0.0.1:0"}}))
    await gpumesh("up", "-d", code=4)  # its only node does not serve yet

    async def tunnel() -> Any:
        return (await gpumesh("status", "--json")).json()["nodes"][0]["tunnel"]

    assert (await tunnel())["error_code"] == "host-key-unknown"
    trusted_at = time.monotonic()
    await gpumesh("trust", "-y", "iceland")
    while (now := await tunnel())["state"] != "up":
        assert time.monotonic() - trusted_at < 20, now  # it would wait for 54 to 66 s by itself
    assert now["error_code"] is now["hint"] is None
    await gpumesh("down")
