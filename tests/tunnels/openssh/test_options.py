"""The command lines of ssh."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from gpumesh.topology import SshSpec, TransportKind
from gpumesh.tunnels.openssh.options import master_command
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.sshd import needs_sshd

pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]


def test_no_secret_is_an_argument_and_no_host_name_is_an_option(tmp_path: Path) -> None:
    ssh = SshSpec("-oProxyCommand=evil", user="me", alias=None, known_hosts=tmp_path / "a b%c", agent=False)
    setup = ConnectRequest("n", ssh, (), (("password", "hunter2"), ("passphrase", "hunter3")), control_dir="/x")
    command = master_command(setup, Path("/x/c"), batch=False, session=True)
    assert "hunter" not in " ".join(command)
    assert command[command.index("--") + 1 :] == ["-oProxyCommand=evil", "exec cat"]
    assert f'UserKnownHostsFile="{tmp_path}/a b%%c"' in command
    assert "hunter" not in repr(setup)


def test_jump_hosts_are_a_chain_that_ssh_can_read(tmp_path: Path) -> None:
    """Each ``ssh`` of the chain unquotes and expands its ProxyCommand once."""
    ssh = SshSpec(
        "gpu", known_hosts=tmp_path / "k%h", proxy_jump=("a@one:2201", "two"), transport=TransportKind.OPENSSH
    )
    command = master_command(ConnectRequest("n", ssh, ()), Path("/x/c"), batch=True, session=True)
    (last,) = [argument.removeprefix("ProxyCommand=") for argument in command if argument.startswith("ProxyCommand=")]
    arguments = shlex.split(re.sub("%([hp%])", lambda match: {"h": "gpu", "p": "22", "%": "%"}[match[1]], last))
    assert arguments[-1] == "two"
    assert arguments[arguments.index("-W") + 1] == "[gpu]:22"
    (first,) = [
        argument.removeprefix("ProxyCommand=") for argument in arguments if argument.startswith("ProxyCommand=")
    ]
    inner = shlex.split(first)
    assert inner[-1] == "one"
    assert inner[inner.index("-W") + 1] == "[%h]:%p"
    assert inner[inner.index("-l") + 1] == "a"
    assert inner[inner.index("-p") + 1] == "2201"
