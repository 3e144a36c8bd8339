from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.config.ssh import ssh_config, ssh_files
from gpumesh.config.ssh.ssh_config import AliasSettings

Write = Callable[[str], Path]


@pytest.fixture(params=["ssh -G", "our own reader"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each answer must be the same whether ssh gives it or, where there is none, our own reader."""
    if request.param == "ssh -G" and shutil.which("ssh") is None:
        pytest.skip("no ssh here")
    if request.param == "our own reader":
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    (tmp_path / ".ssh").mkdir(mode=0o700)
    return tmp_path


def configure(home: Path, text: str, name: str = "config") -> None:
    path = home / ".ssh" / name
    path.write_text(text)
    path.chmod(0o600)


def test_an_alias(home: Path) -> None:
    configure(
        home,
        "# GPUs\nHost gpu1 gpu2\n  HostName 10.0.0.9\n  Port=2200\n  user ops\n"
        "  IdentityFile ~/.ssh/ops\n  IdentityFile %d/keys/%h\n  UserKnownHostsFile /kh\nHost *\n  User other\n",
    )
    answer = ssh_config.resolve_alias("gpu1", home=home)
    assert replace(answer, known_hosts=None) == AliasSettings(
        "10.0.0.9", 2200, "ops", ("~/.ssh/ops", f"{home}/keys/10.0.0.9"), None, (), (), True
    )
    assert answer.known_hosts == "/kh"


def test_patterns_and_the_first_value(home: Path) -> None:
    configure(home, "Host gpu-* !gpu-9\n  User a\n  HostName %h.example.com\nHost *\n  User b\n  Port 7\n")
    one = ssh_config.resolve_alias("gpu-1", home=home)
    assert (one.host, one.user, one.port) == ("gpu-1.example.com", "a", 7)
    nine = ssh_config.resolve_alias("gpu-9", home=home)
    assert (nine.host, nine.user, nine.port) == ("gpu-9", "b", 7)


def test_included_files_and_match(home: Path) -> None:
    configure(home, f"Include {home}/.ssh/more-*\nMatch host gpu1\n  Port 9\nMatch all\n  User z\n")
    configure(home, "Host gpu1\n  HostName 10.0.0.9\n", "more-1")
    answer = ssh_config.resolve_alias("gpu1", home=home)
    assert (answer.host, answer.user) == ("10.0.0.9", "z")
    assert ssh_config.resolve_alias("gpu2", home=home).host == "gpu2"


def test_nothing_configured(home: Path) -> None:
    configure(home, "Host other\n  User x\n")
    assert ssh_config.resolve_alias("gpu1", home=home) == AliasSettings("gpu1", configured=False)


@pytest.mark.parametrize(
    ("line", "need"),
    [
        ("ProxyCommand nc %h %p", "ProxyCommand"),
        ("IdentityAgent /run/agent", "IdentityAgent"),
        ("CertificateFile /c", "CertificateFile"),
        ("HostKeyAlias other", "HostKeyAlias"),
        ("BindAddress 127.0.0.1", "BindAddress"),
    ],
)
def test_what_only_ssh_can_do_is_told(home: Path, line: str, need: str) -> None:
    configure(home, f"Host gpu1\n  {line}\n")
    assert ssh_config.resolve_alias("gpu1", home=home).openssh_features == (need,)


def test_what_is_switched_off_is_not_needed(home: Path) -> None:
    configure(home, "Host gpu1\n  ProxyCommand none\n  IdentityAgent none\n  ProxyJump none\n")
    answer = ssh_config.resolve_alias("gpu1", home=home)
    assert (answer.openssh_features, answer.proxy_jump) == ((), ())


def test_match_exec_is_told_where_it_may_concern_the_host(home: Path) -> None:
    configure(home, 'Match host gpu1 exec "true"\n  Port 9\nMatch host gpu2 exec "true"\n  Port 8\n')
    assert ssh_config.resolve_alias("gpu1", home=home).openssh_features == ("Match exec",)
    assert ssh_config.resolve_alias("gpu3", home=home).openssh_features == ()


def test_jumps_are_looked_up_as_well(home: Path) -> None:
    configure(
        home,
        "Host gpu1\n  ProxyJump bastion,eve@plain:99\nHost bastion\n  HostName 10.0.0.1\n  User b\n  Port 2222\n"
        "  ProxyJump outer\nHost outer\n  HostName 10.0.0.2\n  IdentityFile /k\n",
    )
    answer = ssh_config.resolve_alias("gpu1", home=home)
    assert answer.proxy_jump == ("10.0.0.2", "b@10.0.0.1:2222", "eve@plain:99")
    assert answer.openssh_features == ()
    assert [hop and (hop.alias, hop.identity_files) for hop in answer.jump_aliases] == [
        ("outer", ("/k",)),
        ("bastion", ()),
        None,
    ]


def test_a_jump_with_a_user_is_looked_up_as_well(home: Path) -> None:
    configure(home, "Host gpu1\n  ProxyJump eve@bastion:99\nHost bastion\n  HostName 10.0.0.1\n  User b\n  Port 2222\n")
    assert ssh_config.resolve_alias("gpu1", home=home).proxy_jump == ("eve@10.0.0.1:99",)


def test_what_only_ssh_can_do_for_a_jump_host_is_told(home: Path) -> None:
    configure(home, "Host gpu1\n  ProxyJump bastion\nHost bastion\n  ProxyCommand nc %h %p\n")
    assert ssh_config.resolve_alias("gpu1", home=home).openssh_features == ("ProxyCommand",)


def test_several_files_of_known_hosts(home: Path) -> None:
    spaced = home / "known hosts"
    spaced.touch()
    configure(home, f'Host gpu1\n  Port 9\n  UserKnownHostsFile /dev/null "{spaced}" /kh/%k-%p-%% /b\n')
    answer = ssh_config.resolve_alias("gpu1", home=home)
    assert (answer.known_hosts, answer.more_known_hosts) == (str(spaced), ("/kh/gpu1-9-%", "/b"))


@pytest.mark.parametrize(
    ("value", "accepts"), [("no", True), ("off", True), ("accept-new", True), ("yes", False), ("ask", False)]
)
def test_whether_ssh_accepts_a_new_key(home: Path, value: str, accepts: bool) -> None:
    configure(home, f"Host gpu1\n  User x\n  StrictHostKeyChecking {value}\n")
    assert ssh_config.resolve_alias("gpu1", home=home).accepts_new_keys is accepts


def test_jumps_in_a_circle_end(home: Path) -> None:
    configure(home, "Host gpu1\n  ProxyJump gpu2\nHost gpu2\n  ProxyJump gpu1\n")
    with pytest.raises(ValueError, match="more than 4 hosts"):
        ssh_config.resolve_alias("gpu1", home=home)


@pytest.mark.parametrize("alias", ["-oProxyCommand=touch /tmp/x", "", "a b", "$(x)", "a\nb", "--"])
def test_what_could_be_an_option_is_never_given_to_ssh(home: Path, alias: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a Host"):
        ssh_config.resolve_alias(alias, home=home)


def test_an_include_of_itself_ends(home: Path) -> None:
    configure(home, f"Include {home}/.ssh/config\nHost a\n  Port 5\n")
    answers = ssh_files.read_host_options("a", home)
    assert ("port", "5") in answers
    assert len(answers) <= 20_000


# -- with the system's ssh only --------------------------------------------------------------------------------------

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")


@needs_ssh
def test_a_fault_in_the_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    configure(tmp_path, "Host a\n  NoSuchThing yes\n")
    with pytest.raises(ValueError, match=r"`ssh -G a` failed: .*line 2: Bad configuration option: nosuchthing"):
        ssh_config.resolve_alias("a", home=tmp_path)


def test_an_ssh_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {tmp_path}/pid\nwait\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ssh_config, "TIMEOUT_S", 0.3)
    with pytest.raises(ValueError, match="did not answer within"):
        ssh_config.resolve_alias("a", home=tmp_path)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline


def test_what_ssh_prints_is_bounded_and_made_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nprintf '\\033[31mbad' >&2\nyes | head -c 3000000\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"`ssh -G a` failed: \?\[31mbad"):
        ssh_config.resolve_alias("a", home=tmp_path)


def test_settings_of_keys(home: Path) -> None:
    configure(
        home,
        "Host only\n  IdentitiesOnly yes\n  IdentityFile ~/.ssh/id_rsa\nHost nothing\n  IdentityFile none\n"
        "  IdentityAgent none\nHost plain\n  User x\n",
    )
    only = ssh_config.resolve_alias("only", home=home)
    # One of the keys that ssh tries by default: it is then the only one.
    assert (only.identities_only, only.identity_files, only.agent) == (True, ("~/.ssh/id_rsa",), True)
    nothing = ssh_config.resolve_alias("nothing", home=home)
    assert (nothing.no_identity_files, nothing.identity_files, nothing.agent) == (True, (), False)
    plain = ssh_config.resolve_alias("plain", home=home)
    assert (plain.identities_only, plain.identity_files, plain.no_identity_files, plain.agent) == (
        False, (), False, True,
    )  # fmt: skip


def test_tokens_and_variables_in_key_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setenv("KEYS", "/keys")
    configure(
        home,
        "Host gpu\n  HostName 10.0.0.9\n  Port 2200\n  User ops\n  IdentityFile ${KEYS}/%r@%h:%p-%u-%n-%k-100%%\n"
        "Host bare\n  IdentityFile ${NOT_SET}/%r@%h:%p\n",
    )
    gpu = ssh_config.resolve_alias("gpu", home=home)
    assert gpu.identity_files == ("/keys/ops@10.0.0.9:2200-me-gpu-gpu-100%",)
    bare = ssh_config.resolve_alias("bare", home=home)
    assert bare.identity_files[0].startswith("${NOT_SET}/")
    assert bare.identity_files[0].endswith("@bare:22")


@pytest.mark.parametrize(
    ("line", "need"),
    [
        ("PubkeyAuthentication no", ("PubkeyAuthentication",)),
        ("PubkeyAuthentication yes", ()),
        ("PreferredAuthentications password", ("PreferredAuthentications",)),
        ("RevokedHostKeys /k", ("RevokedHostKeys",)),
        ("GlobalKnownHostsFile /k", ("GlobalKnownHostsFile",)),
        ("ForkAfterAuthentication yes", ()),
        ("SessionType subsystem", ()),
        ("RemoteCommand top", ()),
        ("SendEnv LANG", ()),
        ("Ciphers aes128-ctr", ()),
        ("LocalForward 1 a:1", ()),
    ],
)
def test_options_that_change_who_may_log_in_or_be_trusted_need_ssh(home: Path, line: str, need: tuple[str]) -> None:
    configure(home, f"Host gpu1\n  {line}\n")
    assert ssh_config.resolve_alias("gpu1", home=home).openssh_features == need
