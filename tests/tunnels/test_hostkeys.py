from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.errors import HostKeyChanged, HostKeyRevoked, HostKeyUnknown, TunnelError
from gpumesh.topology import HostKeyPolicy
from gpumesh.tunnels import hostkeys
from gpumesh.tunnels.hostkeys import (
    HostKey,
    HostKeyStatus,
    KnownHosts,
    host_key_alias,
    known_hosts_address,
    parse_known_hosts,
    read_known_hosts,
    record_host_key,
)
from tests.tunnels.sshd import keygen, needs_sshd

A = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"A" * 32)
B = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"B" * 32)
RSA = HostKey("ssh-rsa", b"\0\0\0\x07ssh-rsa" + b"R" * 64)


def judge(text: str, key: HostKey, *, node: str = "iceland", host: str = "1.2.3.4", port: int = 22) -> HostKeyStatus:
    return parse_known_hosts(text).check_key(key, node=node, host=host, port=port).status


@pytest.mark.parametrize(
    ("hosts", "host", "port", "known"),
    [
        ("1.2.3.4", "1.2.3.4", 22, True),
        ("1.2.3.4", "1.2.3.4", 2222, False),
        ("[1.2.3.4]:2222", "1.2.3.4", 2222, True),
        ("[1.2.3.4]:2222", "1.2.3.4", 22, False),
        ("a,1.2.3.4,b", "1.2.3.4", 22, True),
        ("Box.Example", "box.example", 22, True),
        ("*.example", "box.example", 22, True),
        ("*.example", "example", 22, False),
        ("box?.example", "box1.example", 22, True),
        ("*.example,!bad.example", "bad.example", 22, False),
        ("*.example,!bad.example", "good.example", 22, True),
        ("[*.example]:2222", "box.example", 2222, True),
        ("::1", "::1", 22, True),
        ("[::1]:2222", "::1", 2222, True),
    ],
)
def test_names_and_patterns(hosts: str, host: str, port: int, known: bool) -> None:
    verdict = judge(f"{hosts} {A.public_key_text}\n", A, host=host, port=port)
    assert verdict is (HostKeyStatus.KNOWN if known else HostKeyStatus.UNKNOWN)


def test_unknown_is_not_changed() -> None:
    assert judge("", A) is HostKeyStatus.UNKNOWN
    assert judge(f"5.6.7.8 {A.public_key_text}\n", A) is HostKeyStatus.UNKNOWN
    text = f"1.2.3.4 {B.public_key_text}\n"
    assert judge(text, A) is HostKeyStatus.CHANGED
    assert parse_known_hosts(text).check_key(A, node="n", host="1.2.3.4", port=22).expected == (B,)
    assert (
        judge(f"1.2.3.4 {B.public_key_text}\n1.2.3.4 {A.public_key_text}\n", A) is HostKeyStatus.KNOWN
    )  # one of several


def test_the_nodes_own_entry_decides_alone() -> None:
    moved = (
        f"{host_key_alias('iceland')} {A.public_key_text}\n"
        f"[9.9.9.9]:1 {A.public_key_text}\n1.2.3.4 {B.public_key_text}\n"
    )
    assert judge(moved, A) is HostKeyStatus.KNOWN  # its pod has moved to an address that another pod had
    assert judge(moved, B) is HostKeyStatus.CHANGED
    assert judge(moved, B, node="other") is HostKeyStatus.KNOWN  # which is judged by its address, as ssh would do it


def test_revoked_wins_over_known() -> None:
    text = f"1.2.3.4 {A.public_key_text}\n@revoked * {A.public_key_text}\n"
    assert judge(text, A) is HostKeyStatus.REVOKED
    assert judge(f"1.2.3.4 {A.public_key_text}\n@revoked 5.6.7.8 {A.public_key_text}\n", A) is HostKeyStatus.KNOWN
    assert judge(f"1.2.3.4 {A.public_key_text}\n@revoked * {B.public_key_text}\n", A) is HostKeyStatus.KNOWN


def test_a_certificate_authority_is_no_host_key() -> None:
    judgement = parse_known_hosts(f"@cert-authority *.example {A.public_key_text}\n").check_key(
        A, node="n", host="box.example", port=22
    )
    assert judgement.status is HostKeyStatus.UNKNOWN
    assert judgement.certificate_only


def test_kinds_are_those_on_record() -> None:
    known = parse_known_hosts(
        f"1.2.3.4 {RSA.public_key_text}\n1.2.3.4 {A.public_key_text}\n"
        f"1.2.3.4 {B.public_key_text}\n@revoked 1.2.3.4 x x\n"
    )
    assert known.key_types(node="n", host="1.2.3.4", port=22) == ("ssh-rsa", "ssh-ed25519")
    assert known.key_types(node="n", host="5.6.7.8", port=22) == ()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# a comment",
        "1.2.3.4",
        "1.2.3.4 ssh-ed25519",
        "1.2.3.4 ssh-ed25519 not*base64",
        "@unheard-of 1.2.3.4 ssh-ed25519 AAAA",
        "|1|half ssh-ed25519 AAAA",
        "|1|a|b|c ssh-ed25519 AAAA",
        "@revoked",
        "\x00\xff",
    ],
)
def test_lines_that_cannot_be_read_are_passed_over(line: str) -> None:
    assert judge(f"{line}\n1.2.3.4 {A.public_key_text} comment\n", A) is HostKeyStatus.KNOWN
    assert judge(f"{line}\n", A) is HostKeyStatus.UNKNOWN


@pytest.mark.parametrize("name", ["*", "a,b", "a b", "ü\n", "!x", "Node-1"])
def test_a_nodes_name_is_no_pattern(name: str) -> None:
    quoted = host_key_alias(name)
    assert not set(quoted) & set("*?!, \n|@[]")
    assert judge(f"{quoted} {A.public_key_text}\n", A, node=name) is HostKeyStatus.KNOWN
    assert judge(f"{quoted} {A.public_key_text}\n", A, node=name + "x") is HostKeyStatus.UNKNOWN


@needs_sshd
def test_fingerprint_and_hashes_are_those_of_openssh(tmp_path: Path) -> None:
    public = keygen(tmp_path / "key").with_suffix(".pub")
    shown = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
    known = tmp_path / "known_hosts"
    known.write_text("[1.2.3.4]:2222 " + public.read_text())
    (key,) = (entry.key for entry in read_known_hosts(known).entries)
    assert shown.split()[1] == key.fingerprint
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], capture_output=True, check=True)
    hashed = read_known_hosts(known)
    assert hashed.hashed
    assert hashed.check_key(key, node="n", host="1.2.3.4", port=2222).status is HostKeyStatus.KNOWN
    assert hashed.check_key(key, node="n", host="1.2.3.4", port=22).status is HostKeyStatus.UNKNOWN
    record_host_key(known, key, node="n", host="5.6.7.8", port=22)
    assert "5.6.7.8" not in known.read_text()
    found = subprocess.run(["ssh-keygen", "-F", "5.6.7.8", "-f", str(known)], capture_output=True, check=False)
    assert found.returncode == 0


def test_record_replaces_what_it_supersedes_and_nothing_else(tmp_path: Path) -> None:
    known = tmp_path / "deep" / "known_hosts"
    record_host_key(known, A, node="iceland", host="1.2.3.4", port=13323)
    assert known.stat().st_mode & 0o777 == 0o600
    assert known.parent.stat().st_mode & 0o777 == 0o700
    others = (
        f"# mine\nother,[1.2.3.4]:13323 {A.public_key_text} note\n@revoked * {RSA.public_key_text}\ngarbage\x0bline\n"
    )
    known.write_text(others + known.read_text())
    known.chmod(0o644)
    record_host_key(known, B, node="iceland", host="1.2.3.4", port=13323)
    lines = known.read_text().split("\n")
    assert lines[:4] == ["# mine", f"other {A.public_key_text}", f"@revoked * {RSA.public_key_text}", "garbage\x0bline"]
    assert lines[4:] == [f"gpumesh-node-iceland {B.public_key_text}", f"[1.2.3.4]:13323 {B.public_key_text}", ""]
    assert known.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in known.parent.iterdir()] == ["known_hosts"]  # nothing left beside
    before = known.read_bytes()
    record_host_key(known, B, node="iceland", host="1.2.3.4", port=13323)
    assert known.read_bytes() == before


def test_record_keeps_a_link_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"# caf\xe9\n")
    link = tmp_path / "known_hosts"
    link.symlink_to(real)
    record_host_key(link, A, node="n", host="h", port=22)
    assert link.is_symlink()
    assert real.read_bytes().startswith(b"# caf\xe9\n")
    assert read_known_hosts(link).check_key(A, node="n", host="h", port=22).status is HostKeyStatus.KNOWN


def test_what_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    assert read_known_hosts(tmp_path / "none") == KnownHosts()
    with pytest.raises(TunnelError, match="cannot be read"):
        read_known_hosts(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TunnelError, match="cannot be written"):
        record_host_key(tmp_path / "file" / "known_hosts", A, node="n", host="h", port=22)


RECORD_MANY = """
import sys
from pathlib import Path
from gpumesh.tunnels.hostkeys import HostKey, record_host_key
for number in range(10):
    name = f"{sys.argv[2]}{number}"
    record_host_key(Path(sys.argv[1]), HostKey("ssh-ed25519", b"key"), node=name, host=name, port=22)
"""


def test_writers_at_once_lose_no_line(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    writers = [
        subprocess.Popen([sys.executable, "-c", RECORD_MANY, str(known), name], cwd=Path(__file__).parents[2])
        for name in "ab"
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert len(read_known_hosts(known).entries) == 40


@pytest.mark.parametrize("text", ["export PATH=/x\n", "# mine\nalias ll='ls -l'\n", "not known hosts"])
def test_nothing_is_recorded_in_a_file_of_another_kind(tmp_path: Path, text: str) -> None:
    """A mesh.yaml may name a start-up file of the shell as its known_hosts."""
    profile = tmp_path / "profile"
    profile.write_text(text)
    with pytest.raises(TunnelError, match="is no known_hosts file"):
        admit(profile, A, HostKeyPolicy.ACCEPT_NEW)
    assert profile.read_text() == text
    assert list(tmp_path.iterdir()) == [profile]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "junk\nother ssh-ed25519 AAAA\n"])
def test_a_file_with_a_line_that_nobody_can_read_is_still_one(tmp_path: Path, text: str) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(text)
    admit(known, A, HostKeyPolicy.ACCEPT_NEW)
    assert known.read_text().startswith(text)
    admit(known, A)


def admit(known: Path, key: HostKey, policy: HostKeyPolicy = HostKeyPolicy.STRICT) -> None:
    hostkeys.verify_host_key(key, node="iceland", host="1.2.3.4", port=2222, known_hosts=known, policy=policy)


def test_strict_refuses_the_unknown_and_says_what_to_do(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    with pytest.raises(HostKeyUnknown) as caught:
        admit(known, A)
    assert A.fingerprint in caught.value.message
    assert "gpumesh trust iceland" in (caught.value.hint or "")
    assert not known.exists()


def test_accept_new_records_the_unknown_and_refuses_the_changed(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    admit(known, A, HostKeyPolicy.ACCEPT_NEW)
    admit(known, A)
    before = known.read_bytes()
    with pytest.raises(HostKeyChanged) as caught:
        admit(known, B, HostKeyPolicy.ACCEPT_NEW)
    assert A.fingerprint in caught.value.message
    assert B.fingerprint in caught.value.message
    assert known.read_bytes() == before


def test_revoked_and_authority(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(
        f"@revoked * {A.public_key_text}\n"
        f"@cert-authority {known_hosts_address('1.2.3.4', 2222)} {RSA.public_key_text}\n"
    )
    with pytest.raises(HostKeyRevoked):
        admit(known, A, HostKeyPolicy.ACCEPT_NEW)
    with pytest.raises(HostKeyUnknown, match="certificate authority"):
        admit(known, B, HostKeyPolicy.ACCEPT_NEW)
