"""Logins with an SSH agent, on both transports: what the agent is asked to sign, declines to sign, or has."""

from __future__ import annotations

import getpass
import subprocess
from pathlib import Path

import pytest

from gpumesh.tunnels.transport import ConnectFunction
from tests.prerequisites import needs
from tests.tunnels.logging_in import get_refusal, log_in
from tests.tunnels.sshd import Sshd, keygen, run_agent

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


async def test_an_agent_signs_only_for_a_host_that_takes_the_key(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each signature may need a touch of a token or a click: here a program is asked each time (``ssh-add -c``)."""
    asked = tmp_path / "asked"
    ask = tmp_path / "ask"
    ask.write_text(f"#!/bin/sh\necho asked >> {asked}\n")
    ask.chmod(0o700)
    for name, value in (("SSH_ASKPASS", str(ask)), ("SSH_ASKPASS_REQUIRE", "force"), ("DISPLAY", ":0")):
        monkeypatch.setenv(name, value)
    others = [keygen(tmp_path / f"other{number}") for number in range(3)]
    with run_agent(tmp_path, *others, sshd.identity, confirm=True) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        await log_in(connect, sshd.spec(agent=True, identity_files=()), folder)
    assert asked.read_text() == "asked\n"


async def test_an_agent_that_declines_to_sign_leaves_the_next_key(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person declined, or the token is not there."""
    ask = tmp_path / "ask"
    ask.write_text(f"#!/bin/sh\n[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; exit 1; }}\n")
    ask.chmod(0o700)
    for name, value in (("SSH_ASKPASS", str(ask)), ("SSH_ASKPASS_REQUIRE", "force"), ("DISPLAY", ":0")):
        monkeypatch.setenv(name, value)
    second = keygen(tmp_path / "second")
    with sshd.authorized_keys.open("a") as file:
        file.write(second.with_suffix(".pub").read_text())
    with run_agent(tmp_path, sshd.identity, second, confirm=True) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        await log_in(connect, sshd.spec(agent=True, identity_files=()), folder)
    assert (tmp_path / "asked").exists()


async def test_an_agent_that_declines_to_sign_is_told(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SSH_ASKPASS", "/bin/false"), ("SSH_ASKPASS_REQUIRE", "force"), ("DISPLAY", ":0")):
        monkeypatch.setenv(name, value)
    with run_agent(tmp_path, sshd.identity, confirm=True) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        refusal = await get_refusal(connect, sshd.spec(agent=True, identity_files=()), folder)
    assert refusal.code == "auth-refused"
    assert "sign" in refusal.message
    assert "agent" in refusal.message


async def test_a_certificate_in_the_agent(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = keygen(tmp_path / "ca")
    signing = ["ssh-keygen", "-q", "-s", str(authority), "-I", "test", "-n", getpass.getuser()]
    subprocess.run([*signing, str(sshd.identity.with_suffix(".pub"))], check=True, timeout=20)
    await sshd.stop()
    sshd.options["TrustedUserCAKeys"] = str(authority.with_suffix(".pub"))
    sshd.authorized_keys.write_text("")
    await sshd.start()
    with run_agent(tmp_path, sshd.identity) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        await log_in(connect, sshd.spec(agent=True, identity_files=()), folder)
