"""`gpumesh ssh`: the real ssh with a real sshd, and what is refused or said before it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gpumesh.topology import SshSpec
from gpumesh.tunnels.known_hosts import KnownHost
from gpumesh.tunnels.openssh.terminal import terminal_command
from tests.cli.in_process import invoke
from tests.cli.meshes import isolated_command
from tests.prerequisites import needs
from tests.real.command import Gpumesh
from tests.tunnels.sshd import Sshd


def write(path: Path, *nodes: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"nodes": [{"backend": {"url": "http://127.0.0.1:9"}, **node} for node in nodes]}))
    return path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPUMESH_CONFIG", str(tmp_path / "mesh.yaml"))
    ssh = {
        "host": "203.0.113.7",
        "port": 13323,
        "user": "root",
        "identity_file": "/k/id",
        "known_hosts": "/k/known",
        "proxy_jump": "me@bastion.example:2222",
        "connect_timeout": "9s",
    }
    return write(
        tmp_path / "mesh.yaml",
        {"name": "far", "ssh": ssh},
        {"name": "named", "ssh": {"host": "gpu.example", "agent": False, "host_key_policy": "accept-new"}},
        {"name": "local"},
        {"name": "pod", "ssh": {"user": "root"}, "address_from": {"command": ["echo", "ssh.runpod.io", "2022"]}},
    )


def printed(*words: str) -> list[str]:
    return shlex.split(invoke("ssh", "--print", *words).out)


def test_the_command_line(config: Path) -> None:
    arguments = printed("far", "-L", "8888:localhost:8888", "--", "ls", "-la", "*")
    assert arguments[0] == "ssh"
    assert arguments[arguments.index("-p") :] == ["-p", "13323", "-l", "root", "--", "203.0.113.7", "ls", "-la", "*"]
    options = {value.split("=")[0]: value.split("=", 1)[1] for value in arguments if "=" in value}
    assert options["UserKnownHostsFile"] == '"/k/known"'
    assert options["StrictHostKeyChecking"] == "yes"
    assert options["IdentityFile"] == '"/k/id"'
    assert options["ConnectTimeout"] == "9"
    assert "ClearAllForwardings" not in options, "it would clear the -L as well"
    jump = shlex.split(options["ProxyCommand"])
    assert jump[jump.index("-l") :] == ["-l", "me", "-p", "2222", "-W", "[%h]:%p", "--", "bastion.example"]
    assert 'UserKnownHostsFile="/k/known"' in jump


def test_the_command_line_of_a_named_host(config: Path) -> None:
    arguments = printed("named")
    expected = {
        "HostName=gpu.example",
        "IdentityAgent=none",
        "StrictHostKeyChecking=accept-new",
        "ClearAllForwardings=yes",
    }
    assert expected <= set(arguments)
    assert any(argument.startswith("HostKeyAlias=gpumesh-mesh-") for argument in arguments), "a pod's key moves with it"
    assert arguments[-1] == "gpu.example"


def test_the_address_is_the_one_of_now_and_may_be_a_proxy_for_terminals(config: Path) -> None:
    arguments = printed("pod")
    assert arguments[arguments.index("-p") + 1] == "2022"
    assert arguments[-1] == "ssh.runpod.io"


def test_a_name_in_mesh_yaml_is_no_option_of_ssh(tmp_path: Path) -> None:
    ssh = SshSpec("-oProxyCommand=evil", user="-v", known_hosts=tmp_path / "none", alias="-oProxyCommand=evil")
    arguments = terminal_command(KnownHost(ssh.host, 22, "far"), ssh, ["-x"])
    assert arguments[-5:] == ["-l", "-v", "--", "-oProxyCommand=evil", "-x"]


def test_what_is_refused(config: Path) -> None:
    assert "local is reached without SSH" in invoke("ssh", "local", code=2).err
    assert "did you mean far?" in invoke("ssh", "fra", code=2).err
    assert "`gpumesh ssh far`" in invoke("ssh", "me@far", code=2).err
    assert "`gpumesh node add" in invoke("ssh", "root@203.0.113.9", code=2).err


@pytest.fixture
def ssh_that_tells(tmp_path: Path) -> str:
    """A PATH with an `ssh` that shows its environment and exits with 7."""
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / "ssh"
    program.write_text("#!/bin/sh\nenv\ngrep SigIgn /proc/$$/status\nexit 7\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.slow
async def test_secrets_are_named_and_not_passed_on(gpumesh: Gpumesh, ssh_that_tells: str) -> None:
    ssh = {"host": "203.0.113.7", "user": "root", "password_env": "FAR_WORD", "passphrase_env": "FAR_PHRASE"}
    write(gpumesh.config, {"name": "far", "ssh": ssh})
    async with gpumesh.terminal("ssh", "far", PATH=ssh_that_tells, FAR_WORD="hunter2", FAR_PHRASE="hunter3") as shown:
        assert await shown.wait_exit() == 7
    assert "ssh may ask for the password of root: it is in $FAR_WORD" in shown.written
    assert "ssh may ask for the passphrase of the key: it is in $FAR_PHRASE" in shown.written
    assert "`gpumesh trust far` records it" in " ".join(shown.written.split())
    assert f"HOME={gpumesh.home}" in shown.written
    assert "hunter" not in shown.written
    (ignored,) = [line.split()[1] for line in shown.written.splitlines() if line.startswith("SigIgn")]
    assert int(ignored, 16) & 1 << 12 == 0, "SIGPIPE is not ignored"


@pytest_asyncio.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd") as made:
        yield made


@pytest.mark.slow
@pytest.mark.real
@needs("sshd")
async def test_a_command_on_a_real_host(sshd: Sshd, tmp_path: Path) -> None:
    spec = sshd.spec()
    ssh = {
        "user": spec.user,
        "identity_file": str(sshd.identity),
        "known_hosts": str(sshd.known_hosts),
        "agent": False,
    }
    with isolated_command(tmp_path) as gpumesh:
        write(
            gpumesh.config,
            {"name": "far", "ssh": ssh, "address_from": {"command": ["echo", f"127.0.0.1 {sshd.port}"]}},
        )
        ended = await gpumesh("ssh", "far", "--", "echo one | tr o 0; exit 9", code=9)
        assert ended.out == "0ne\n"
        async with gpumesh.terminal("ssh", "far", "--", "test -t 0 && echo on a terminal") as shown:
            assert await shown.wait_exit() == 0
        assert "on a terminal" in shown.written
        await sshd.stop()
        assert "refused" in (await gpumesh("ssh", "far", "--", "true", code=255)).err
