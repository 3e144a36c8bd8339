"""An alias of ~/.ssh/config that only ssh itself understands, from mesh.yaml to a command on the host.

ssh takes the home folder from the account, not from $HOME. So the command runs in a mount namespace in which the
account has another home folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpumesh.errors import ExitCode
from tests.cli.meshes import isolated_command
from tests.prerequisites import needs
from tests.real.command import GPUMESH, Gpumesh
from tests.tunnels.sshd import Sshd

pytestmark = [pytest.mark.real, needs("sshd", "ssh", "netns")]


@dataclass(frozen=True)
class AliasedHost:
    gpumesh: Gpumesh
    used: Path  # a line for each time that the ProxyCommand ran
    passwd: Path

    def write(self, **ssh: Any) -> None:
        node = {"name": "gpu", "ssh": {"alias": "gpu-box", "agent": False, **ssh}}
        self.gpumesh.config.write_text(json.dumps({"version": 1, "nodes": [node]}))

    async def __call__(self, *arguments: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            "unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/passwd && exec "$@"',
            str(self.passwd), str(GPUMESH), *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=self.gpumesh.environment(), cwd=self.gpumesh.home,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 50)
        assert b"Traceback" not in err
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def aliased(tmp_path: Path) -> AsyncIterator[AliasedHost]:
    with isolated_command(tmp_path) as gpumesh:
        async with Sshd(tmp_path / "host") as host, Sshd(tmp_path / "jump") as jump:
            jump.authorized_keys.write_text(host.authorized_keys.read_text())
            used = tmp_path / "used"
            ssh = gpumesh.home / ".ssh"
            ssh.mkdir(mode=0o700)
            user = pwd.getpwuid(os.getuid()).pw_name
            known = ssh / "known_hosts"
            known.write_text(host.known_hosts.read_text() + jump.known_hosts.read_text())
            through = (
                f"ssh -F none -i {host.identity} -o UserKnownHostsFile={known} -p {jump.port} -W %h:%p {user}@127.0.0.1"
            )
            (ssh / "config").write_text("Include more\n")
            (ssh / "more").write_text(
                f"Match originalhost gpu-box exec true\n  HostName 127.0.0.1\n  Port {host.port}\n  User {user}\n"
                f"  IdentityFile {host.identity}\n  ProxyCommand sh -c 'echo used >> {used}; exec {through}'\n"
            )
            for path in ssh.iterdir():
                path.chmod(0o600)
            passwd = tmp_path / "passwd"
            lines = Path("/etc/passwd").read_text().splitlines()
            home = pwd.getpwuid(os.getuid()).pw_dir
            passwd.write_text(
                "".join(
                    f"{line.replace(f':{home}:', f':{gpumesh.home}:') if line.startswith(f'{user}:') else line}\n"
                    for line in lines
                )
            )
            yield AliasedHost(gpumesh, used, passwd)


@pytest.mark.slow
async def test_an_alias_that_needs_ssh_uses_transport_openssh(aliased: AliasedHost) -> None:
    aliased.write()  # the options of the alias decide the transport
    code, out, err = await aliased("exec", "gpu", "--", "sh", "-c", "echo hello; echo $SSH_CONNECTION | wc -w")
    assert (code, out) == (0, "hello\n4\n"), err
    assert aliased.used.read_text() == "used\n"
    code, out, _ = await aliased("config", "check")
    assert code == 0


@pytest.mark.slow
async def test_config_check_names_the_transport_that_an_alias_needs(aliased: AliasedHost) -> None:
    aliased.write()
    code, _, err = await aliased("config", "check")
    assert code == 0
    assert "'gpu-box' uses Match exec and ProxyCommand, so the system's ssh carries this node" in err
    aliased.write(transport="sshtunnel")
    code, _, err = await aliased("config", "check")
    assert code == ExitCode.USAGE
    assert "sshtunnel cannot run the ProxyCommand of 'gpu-box' in ~/.ssh/config: write openssh" in err


@pytest.mark.slow
async def test_trust_uses_the_same_proxy_command(aliased: AliasedHost) -> None:
    known = aliased.gpumesh.home / ".ssh" / "known_hosts"
    jump_only = known.read_text().splitlines()[1]
    known.write_text(jump_only + "\n")
    aliased.write(transport="openssh")
    code, _, err = await aliased("exec", "gpu", "--", "true")
    assert code != 0
    assert "trust" in err
    code, out, err = await aliased("trust", "--yes", "gpu")
    assert code == 0, err
    assert out.rstrip().endswith("new")
    code, _, err = await aliased("exec", "gpu", "--", "true")
    assert code == ExitCode.OK, err
