"""The user's ssh_config is meant for ssh in a terminal: what it may change of our ssh, and what not."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from gpumesh.config.ssh.option_roles import OptionRole, find_role, list_options
from gpumesh.tunnels.openssh.fixed_options import FIXED_OPTIONS, find_unknown_options, read_unknown_options
from gpumesh.tunnels.openssh.options import master_command
from tests.tunnels.openssh.connecting import connect_error, connected, make_setup, run_command
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, needs_sshd
from tests.tunnels.traffic import exchange

pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]

# Each of these would break or leak: a fork, a session without a command, forwards of their own, a terminal, questions.
HOSTILE = """
ForkAfterAuthentication yes
StdinNull yes
SessionType none
RequestTTY force
RemoteCommand echo not-ours
PermitLocalCommand yes
LocalCommand touch {folder}/local-command
LocalForward {used_port} 127.0.0.1:1
RemoteForward {used_port} 127.0.0.1:1
DynamicForward {used_port}
ExitOnForwardFailure yes
Tunnel yes
ForwardAgent yes
ForwardX11 yes
ControlMaster auto
ControlPath {folder}/control-%C
ControlPersist yes
LogLevel DEBUG3
LogVerbose *
VisualHostKey yes
EscapeChar x
BatchMode yes
ConnectionAttempts 7
NumberOfPasswordPrompts 9
AddKeysToAgent yes
UpdateHostKeys yes
NoHostAuthenticationForLocalhost yes
StrictHostKeyChecking no
ServerAliveInterval 0
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write_config(home: Path, text: str) -> None:
    path = home / ".ssh" / "config"
    path.write_text(text)
    path.chmod(0o600)


def list_ssh_processes(folder: Path) -> list[str]:
    """The command lines of all processes that name the folder of the sockets."""
    lines = []
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if process.name.isdigit() and str(folder) in line:
            lines.append(line)
    return lines


@pytest.mark.parametrize("lines", [HOSTILE, "ForkAfterAuthentication yes\nSessionType none\n"])
async def test_no_option_of_the_user_makes_our_ssh_something_else(
    lines: str, home: Path, sshd: Sshd, folder: Path, backend: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        write_config(home, "Host gpu\n" + lines.format(folder=home, used_port=used.getsockname()[1]))
        async with connected(sshd.spec(alias="gpu"), folder, backend) as (connection, (local,)):
            assert await connection.ping(10.0) is not None
            assert await exchange(local, b"through") == b"through"
            stdout, _, status = await run_command(connection, "echo ours")
            assert (stdout, status) == (b"ours\n", 0)
            assert len(list_ssh_processes(folder)) == 1  # the master, and it has forked no other
    await wait_until(lambda: not list_ssh_processes(folder) and not sshd.children(), "the end of all processes")
    assert not (home / "local-command").exists()
    assert not list(home.glob("control-*"))


async def test_an_attempt_that_fails_leaves_no_process(home: Path, sshd: Sshd, folder: Path) -> None:
    write_config(home, "Host gpu\n" + HOSTILE.format(folder=home, used_port=1))
    sshd.authorized_keys.write_text("")
    assert (await connect_error(sshd.spec(alias="gpu"), folder)).code == "auth-refused"
    known = sshd.known_hosts.read_text()
    sshd.known_hosts.write_text("")
    assert (await connect_error(sshd.spec(alias="gpu"), folder)).code == "host-key-unknown"
    assert not sshd.known_hosts.read_text()
    sshd.known_hosts.write_text(known)
    await wait_until(lambda: not list_ssh_processes(folder), "the end of all processes")


async def test_a_jump_host_gets_the_same_options(home: Path, tmp_path: Path, sshd: Sshd, folder: Path) -> None:
    write_config(home, "Host *\n" + HOSTILE.format(folder=home, used_port=1))
    async with Sshd(tmp_path / "jump") as jump:
        jump.authorized_keys.write_text(sshd.authorized_keys.read_text())
        sshd.known_hosts.write_text(sshd.known_hosts.read_text() + jump.known_hosts.read_text())
        ssh = sshd.spec(proxy_jump=(f"{sshd.spec().user}@127.0.0.1:{jump.port}",))
        async with connected(ssh, folder) as (connection, _):
            assert await connection.ping(10.0) is not None
        await wait_until(lambda: not list_ssh_processes(folder), "the end of all processes")
        await wait_until(lambda: not jump.children() and not sshd.children(), "the end of all sessions")


def test_each_option_of_the_installed_ssh_has_a_role() -> None:
    output = subprocess.run(["ssh", "-G", "-F", "none", "x"], capture_output=True, text=True, check=True, timeout=20)
    keys = {line.split()[0] for line in output.stdout.splitlines()}
    assert len(keys) > 60
    assert [key for key in sorted(keys) if find_role(key) is None] == []


def test_each_fixed_option_is_set(tmp_path: Path, sshd_spec: Sshd) -> None:
    command = master_command(make_setup(sshd_spec.spec(), tmp_path), tmp_path / "c", batch=True, session=True)
    given = {command[at + 1].split("=")[0] for at, word in enumerate(command) if word == "-o"}
    assert set(list_options(OptionRole.FIXED)) <= given
    assert set(FIXED_OPTIONS) <= set(list_options(OptionRole.FIXED))


@pytest.fixture
def sshd_spec(tmp_path: Path) -> Sshd:
    """An sshd that is not started."""
    return Sshd(tmp_path / "unused", port=1)


async def test_an_option_that_this_ssh_does_not_know_is_left_out(tmp_path: Path, sshd_spec: Sshd) -> None:
    unknown = await read_unknown_options()
    setup = make_setup(sshd_spec.spec(), tmp_path)
    command = master_command(setup, tmp_path / "c", batch=True, session=True, unknown=unknown)
    asked = subprocess.run(["ssh", "-G", *command[1:]], check=False, capture_output=True, text=True, timeout=20)
    assert "Bad configuration option" not in asked.stderr + (tmp_path / "cl").read_text()
    assert asked.returncode == 0
    output = await asyncio.to_thread(
        subprocess.run, ["ssh", "-G", "-F", "none", "x"], capture_output=True, text=True, timeout=20
    )
    old_ssh = "".join(line for line in output.stdout.splitlines(True) if not line.startswith("forkafter"))
    assert find_unknown_options(old_ssh) == unknown | {"forkafterauthentication"}
    assert find_unknown_options("no such option: -G") == frozenset()


def test_a_key_of_an_alias_is_offered_once(tmp_path: Path, sshd_spec: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh reads the alias itself. But a file of another home folder has paths that ssh does not find."""
    setup = make_setup(sshd_spec.spec(alias="gpu", keys_of_alias=True), tmp_path)
    argument = f'IdentityFile="{sshd_spec.identity}"'
    monkeypatch.setenv("HOME", pwd.getpwuid(os.getuid()).pw_dir)
    assert argument not in master_command(setup, tmp_path / "c", batch=True, session=True)
    (tmp_path / ".ssh").mkdir()
    write_config(tmp_path, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert argument in master_command(setup, tmp_path / "c", batch=True, session=True)
