from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.errors import HostKeyChanged, HostKeyRevoked, HostKeyUnknown, TunnelError
from gpumesh.topology import HostKeyPolicy
from gpumesh.tunnels import hostkeys
from gpumesh.tunnels.hostkeys import HostKey, KnownHosts, Verdict, address_name, node_name, parse, read, record
from tests.tunnels.sshd import keygen, needs_sshd

A = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"A" * 32)
B = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"B" * 32)
RSA = HostKey("ssh-rsa", b"\0\0\0\x07ssh-rsa" + b"R" * 64)


def judge(text: str, key: HostKey, *, node: str = "iceland", host: str = "1.2.3.4", port: int = 22) -> Verdict:
    return parse(text).judge(key, node=node, host=host, port=port).verdict


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
    verdict = judge(f"{hosts} {A.line}\n", A, host=host, port=port)
    assert verdict is (Verdict.KNOWN if known else Verdict.UNKNOWN)


def test_unknown_is_not_changed() -> None:
    assert judge("", A) is Verdict.UNKNOWN
    assert judge(f"5.6.7.8 {A.line}\n", A) is Verdict.UNKNOWN
    text = f"1.2.3.4 {B.line}\n"
    assert judge(text, A) is Verdict.CHANGED
    assert parse(text).judge(A, node="n", host="1.2.3.4", port=22).expected == (B,)
    assert judge(f"1.2.3.4 {B.line}\n1.2.3.4 {A.line}\n", A) is Verdict.KNOWN  # one of several


def test_the_nodes_own_entry_decides_alone() -> None:
    moved = f"{node_name('iceland')} {A.line}\n[9.9.9.9]:1 {A.line}\n1.2.3.4 {B.line}\n"
    assert judge(moved, A) is Verdict.KNOWN  # its pod has moved to an address that another pod had
    assert judge(moved, B) is Verdict.CHANGED
    assert judge(moved, B, node="other") is Verdict.KNOWN  # which is judged by its address, as ssh would do it


def test_revoked_wins_over_known() -> None:
    text = f"1.2.3.4 {A.line}\n@revoked * {A.line}\n"
    assert judge(text, A) is Verdict.REVOKED
    assert judge(f"1.2.3.4 {A.line}\n@revoked 5.6.7.8 {A.line}\n", A) is Verdict.KNOWN
    assert judge(f"1.2.3.4 {A.line}\n@revoked * {B.line}\n", A) is Verdict.KNOWN


def test_a_certificate_authority_is_no_host_key() -> None:
    judgement = parse(f"@cert-authority *.example {A.line}\n").judge(A, node="n", host="box.example", port=22)
    assert judgement.verdict is Verdict.UNKNOWN
    assert judgement.by_authority


def test_kinds_are_those_on_record() -> None:
    known = parse(f"1.2.3.4 {RSA.line}\n1.2.3.4 {A.line}\n1.2.3.4 {B.line}\n@revoked 1.2.3.4 x x\n")
    assert known.kinds(node="n", host="1.2.3.4", port=22) == ("ssh-rsa", "ssh-ed25519")
    assert known.kinds(node="n", host="5.6.7.8", port=22) == ()


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
    assert judge(f"{line}\n1.2.3.4 {A.line} comment\n", A) is Verdict.KNOWN
    assert judge(f"{line}\n", A) is Verdict.UNKNOWN


@pytest.mark.parametrize("name", ["*", "a,b", "a b", "ü\n", "!x", "Node-1"])
def test_a_nodes_name_is_no_pattern(name: str) -> None:
    quoted = node_name(name)
    assert not set(quoted) & set("*?!, \n|@[]")
    assert judge(f"{quoted} {A.line}\n", A, node=name) is Verdict.KNOWN
    assert judge(f"{quoted} {A.line}\n", A, node=name + "x") is Verdict.UNKNOWN


@needs_sshd
def test_fingerprint_and_hashes_are_those_of_openssh(tmp_path: Path) -> None:
    public = keygen(tmp_path / "key").with_suffix(".pub")
    shown = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
    known = tmp_path / "known_hosts"
    known.write_text("[1.2.3.4]:2222 " + public.read_text())
    (key,) = (entry.key for entry in read(known).entries)
    assert shown.split()[1] == key.fingerprint
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], capture_output=True, check=True)
    hashed = read(known)
    assert hashed.hashed
    assert hashed.judge(key, node="n", host="1.2.3.4", port=2222).verdict is Verdict.KNOWN
    assert hashed.judge(key, node="n", host="1.2.3.4", port=22).verdict is Verdict.UNKNOWN
    record(known, key, node="n", host="5.6.7.8", port=22)
    assert "5.6.7.8" not in known.read_text()
    found = subprocess.run(["ssh-keygen", "-F", "5.6.7.8", "-f", str(known)], capture_output=True, check=False)
    assert found.returncode == 0


def test_record_replaces_what_it_supersedes_and_nothing_else(tmp_path: Path) -> None:
    known = tmp_path / "deep" / "known_hosts"
    record(known, A, node="iceland", host="1.2.3.4", port=13323)
    assert known.stat().st_mode & 0o777 == 0o600
    assert known.parent.stat().st_mode & 0o777 == 0o700
    others = f"# mine\nother,[1.2.3.4]:13323 {A.line} note\n@revoked * {RSA.line}\ngarbage\x0bline\n"
    known.write_text(others + known.read_text())
    known.chmod(0o644)
    record(known, B, node="iceland", host="1.2.3.4", port=13323)
    lines = known.read_text().split("\n")
    assert lines[:4] == ["# mine", f"other {A.line}", f"@revoked * {RSA.line}", "garbage\x0bline"]
    assert lines[4:] == [f"gpumesh-node-iceland {B.line}", f"[1.2.3.4]:13323 {B.line}", ""]
    assert known.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in known.parent.iterdir()] == ["known_hosts"]  # nothing left beside
    before = known.read_bytes()
    record(known, B, node="iceland", host="1.2.3.4", port=13323)
    assert known.read_bytes() == before


def test_record_keeps_a_link_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"# caf\xe9\n")
    link = tmp_path / "known_hosts"
    link.symlink_to(real)
    record(link, A, node="n", host="h", port=22)
    assert link.is_symlink()
    assert real.read_bytes().startswith(b"# caf\xe9\n")
    assert read(link).judge(A, node="n", host="h", port=22).verdict is Verdict.KNOWN


def test_what_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == KnownHosts()
    with pytest.raises(TunnelError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TunnelError, match="cannot be written"):
        record(tmp_path / "file" / "known_hosts", A, node="n", host="h", port=22)


RECORD_MANY = """
import sys
from pathlib import Path
from gpumesh.tunnels.hostkeys import HostKey, record
for number in range(10):
    name = f"{sys.argv[2]}{number}"
    record(Path(sys.argv[1]), HostKey("ssh-ed25519", b"key"), node=name, host=name, port=22)
"""


def test_writers_at_once_lose_no_line(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    writers = [
        subprocess.Popen([sys.executable, "-c", RECORD_MANY, str(known), name], cwd=Path(__file__).parents[2])
        for name in "ab"
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert len(read(known).entries) == 40


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
    hostkeys.admit(key, node="iceland", host="1.2.3.4", port=2222, known_hosts=known, policy=policy)


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
    known.write_text(f"@revoked * {A.line}\n@cert-authority {address_name('1.2.3.4', 2222)} {RSA.line}\n")
    with pytest.raises(HostKeyRevoked):
        admit(known, A, HostKeyPolicy.ACCEPT_NEW)
    with pytest.raises(HostKeyUnknown, match="certificate authority"):
        admit(known, B, HostKeyPolicy.ACCEPT_NEW)
