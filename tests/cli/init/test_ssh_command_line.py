from __future__ import annotations

import pytest

from gpumesh.cli.init.ssh_command_line import SshLine, parse_ssh_line
from gpumesh.errors import UsageError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ssh root@209.170.80.132 -p 13323", SshLine("209.170.80.132", 13323, "root")),
        ("ssh -p 13323 root@209.170.80.132", SshLine("209.170.80.132", 13323, "root")),
        ("ssh -p13323 -l root 209.170.80.132", SshLine("209.170.80.132", 13323, "root")),
        ("root@host", SshLine("host", 22, "root")),
        ("/usr/bin/ssh host", SshLine("host")),
        ("ssh root@h -i ~/.ssh/id_ed25519", SshLine("h", 22, "root", "~/.ssh/id_ed25519")),
        ("ssh -i '/a b/key' h", SshLine("h", identity="/a b/key")),
        ("ssh -J me@bastion:2222 h", SshLine("h", jump="me@bastion:2222")),
        ("ssh -o Port=2200 -o 'User root' -o IdentityFile=k h", SshLine("h", 2200, "root", "k")),
        ("ssh -p 1 -o Port=2 h", SshLine("h", 1)),
        ("ssh -o Port=2 -p 1 h", SshLine("h", 2)),
        ("ssh -p 1 -p 2 h", SshLine("h", 1)),
        ("ssh -l a u@h -l b", SshLine("h", user="a")),
        ("ssh u@h -l a", SshLine("h", user="u")),
        ("ssh -p 1 ssh://u@h:2", SshLine("h", 1, "u")),
        ("ssh ssh://u@h:2 -p 1", SshLine("h", 2, "u")),
        ("ssh -i first h -i second", SshLine("h", identity="first")),
        ("ssh -tt -4 -N h", SshLine("h")),
        ("ssh -Nf h uptime -p 3", SshLine("h")),
        ("ssh ssh://root@h:2200/", SshLine("h", 2200, "root")),
        ("ssh root@[2001:db8::1] -p 22", SshLine("2001:db8::1", 22, "root")),
        ("ssh -p 20544 root@142.214.185.187 -L 8080:localhost:8000",
         SshLine("142.214.185.187", 20544, "root", forwarded_ports=(8000,))),
        ("ssh h -L 127.0.0.1:1:127.0.0.1:11434 -L 2:elsewhere:80 -L /run/a.sock:/run/b.sock",
         SshLine("h", forwarded_ports=(11434,))),
        ("iceland=ssh root@h -p 22", SshLine("h", 22, "root", given_name="iceland")),
        ("root@h:2222", SshLine("h", 2222, "root")),
        ("ssh root@h:2222 -p 2222", SshLine("h", 2222, "root")),
        ("h -p 22", SshLine("h", 22)),
        ("root@h 2222", SshLine("h", 2222, "root")),
        ("ssh h 2222 x", SshLine("h")),
        ("ssh root@::1", SshLine("::1", 22, "root")),
        ("[2001:db8::1]:2222", SshLine("2001:db8::1", 2222)),
        ("$ ssh root@h -p 22", SshLine("h", 22, "root")),
        ("'ssh root@h -p 22'", SshLine("h", 22, "root")),
        ("  `ssh root@h`  ", SshLine("h", 22, "root")),
        ("box=root@h:23", SshLine("h", 23, "root", given_name="box")),
    ],
)  # fmt: skip
def test_lines_are_read_as_ssh_reads_them(line: str, expected: SshLine) -> None:
    assert parse_ssh_line(line) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "names no host"),
        ("ssh", "names no host"),
        ("ssh -p 22", "names no host"),
        ("ssh root@", "names no host"),
        ("ssh -p", "-p needs a value"),
        ("ssh -p 99999 h", "'99999' is not a port"),
        ("ssh -p 0 h", "'0' is not a port"),
        ("ssh -p ² h", "'²' is not a port"),
        ("ssh -p 1 root@h:22", "names two ports: 22 and 1"),
        ("ssh root@h:22 -p 1", "names two ports: 22 and 1"),
        ("root@h:99999", "'99999' is not a port"),
        ("ssh 'h", "No closing quotation"),
        ("ssh abc-6441@ssh.runpod.io -i ~/.ssh/id_ed25519", "RunPod's proxy"),
    ],
)
def test_a_line_without_a_host_is_an_error(line: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_ssh_line(line)


@pytest.mark.parametrize(
    ("line", "name"),
    [("h", "h"), ("GPU_box.lan", "gpu-box-lan"), ("209.170.80.132", "host-209-170-80-132"), ("[::1]", "host-1"),
     ("My.Box=root@h", "My.Box")],
)  # fmt: skip
def test_names(line: str, name: str) -> None:
    assert parse_ssh_line(line).name == name
