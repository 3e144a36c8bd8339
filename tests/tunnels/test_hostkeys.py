"""Whether a host's key is trusted, and the errors that say why not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from gpumesh.errors import HostKeyChanged, HostKeyRevoked, HostKeyUnknown, TunnelError
from gpumesh.topology import HostKeyPolicy
from gpumesh.tunnels import hostkeys
from gpumesh.tunnels.hostkeys import HostKeyCheck, HostKeyStatus, check_host_key
from gpumesh.tunnels.known_hosts import (
    HostKey,
    KnownHost,
    host_key_alias,
    known_hosts_address,
    parse_known_hosts,
)

A = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"A" * 32)


B = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"B" * 32)


RSA = HostKey("ssh-rsa", b"\0\0\0\x07ssh-rsa" + b"R" * 64)


def check_status(
    text: str, key: HostKey, *, node: str = "iceland", host: str = "1.2.3.4", port: int = 22
) -> HostKeyStatus:
    return check_host_key(parse_known_hosts(text), key, KnownHost(host, port, node)).status


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
    status = check_status(f"{hosts} {A.public_key_text}\n", A, host=host, port=port)
    assert status is (HostKeyStatus.KNOWN if known else HostKeyStatus.UNKNOWN)


def test_unknown_and_changed_keys_differ() -> None:
    assert check_status("", A) is HostKeyStatus.UNKNOWN
    assert check_status(f"5.6.7.8 {A.public_key_text}\n", A) is HostKeyStatus.UNKNOWN
    text = f"1.2.3.4 {B.public_key_text}\n"
    assert check_status(text, A) is HostKeyStatus.CHANGED
    assert check_host_key(parse_known_hosts(text), A, KnownHost("1.2.3.4", 22, "n")).expected == (B,)
    assert (
        check_status(f"1.2.3.4 {B.public_key_text}\n1.2.3.4 {A.public_key_text}\n", A) is HostKeyStatus.KNOWN
    )  # several keys are on record


def test_the_nodes_own_entry_is_preferred_to_the_address() -> None:
    moved = (
        f"{host_key_alias('iceland')} {A.public_key_text}\n"
        f"[9.9.9.9]:1 {A.public_key_text}\n1.2.3.4 {B.public_key_text}\n"
    )
    assert check_status(moved, A) is HostKeyStatus.KNOWN  # the pod has moved to an address that another pod had
    assert check_status(moved, B) is HostKeyStatus.CHANGED
    assert (
        check_status(moved, B, node="other") is HostKeyStatus.KNOWN
    )  # which is judged by its address, as ssh would do it


def test_revoked_wins_over_known() -> None:
    text = f"1.2.3.4 {A.public_key_text}\n@revoked * {A.public_key_text}\n"
    assert check_status(text, A) is HostKeyStatus.REVOKED
    assert (
        check_status(f"1.2.3.4 {A.public_key_text}\n@revoked 5.6.7.8 {A.public_key_text}\n", A) is HostKeyStatus.KNOWN
    )
    assert check_status(f"1.2.3.4 {A.public_key_text}\n@revoked * {B.public_key_text}\n", A) is HostKeyStatus.KNOWN


def test_a_certificate_authority_is_no_host_key() -> None:
    known = parse_known_hosts(f"@cert-authority *.example {A.public_key_text}\n")
    check = check_host_key(known, A, KnownHost("box.example", 22, "n"))
    assert check.status is HostKeyStatus.UNKNOWN
    assert check.certificate_only


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
def test_lines_that_cannot_be_parsed_are_skipped(line: str) -> None:
    assert check_status(f"{line}\n1.2.3.4 {A.public_key_text} comment\n", A) is HostKeyStatus.KNOWN
    assert check_status(f"{line}\n", A) is HostKeyStatus.UNKNOWN


@pytest.mark.parametrize("name", ["*", "a,b", "a b", "ü\n", "!x", "Node-1"])
def test_a_nodes_name_is_no_pattern(name: str) -> None:
    quoted = host_key_alias(name)
    assert not set(quoted) & set("*?!, \n|@[]")
    assert check_status(f"{quoted} {A.public_key_text}\n", A, node=name) is HostKeyStatus.KNOWN
    assert check_status(f"{quoted} {A.public_key_text}\n", A, node=name + "x") is HostKeyStatus.UNKNOWN


@pytest.mark.parametrize("text", ["export PATH=/x\n", "# mine\nalias ll='ls -l'\n", "not known hosts"])
def test_nothing_is_recorded_in_a_file_of_another_kind(tmp_path: Path, text: str) -> None:
    """A mesh.yaml may name a start-up file of the shell as its known_hosts."""
    profile = tmp_path / "profile"
    profile.write_text(text)
    with pytest.raises(TunnelError, match="is no known_hosts file"):
        verify(profile, A, HostKeyPolicy.ACCEPT_NEW)
    assert profile.read_text() == text
    assert list(tmp_path.iterdir()) == [profile]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "junk\nother ssh-ed25519 AAAA\n"])
def test_a_known_hosts_file_may_have_lines_that_cannot_be_parsed(tmp_path: Path, text: str) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(text)
    verify(known, A, HostKeyPolicy.ACCEPT_NEW)
    assert known.read_text().startswith(text)
    verify(known, A)


def test_nodes_of_the_same_name_in_two_meshes_are_two_hosts() -> None:
    home, work = KnownHost("h", 22, "gpu", "/home/mesh.yaml"), KnownHost("w", 22, "gpu", "/work/mesh.yaml")
    assert home.own_name != work.own_name
    assert home.shared_name == work.shared_name == host_key_alias("gpu")
    known = parse_known_hosts(f"{home.own_name} {A.public_key_text}\n")
    assert check_host_key(known, A, home) == HostKeyCheck(HostKeyStatus.KNOWN, decided_by=home.own_name)
    assert check_host_key(known, B, home).status is HostKeyStatus.CHANGED
    assert check_host_key(known, B, work).status is HostKeyStatus.UNKNOWN
    jump = KnownHost("h", 22)
    assert (jump.own_name, jump.shared_name, jump.names) == (None, None, ("h",))
    assert check_host_key(known, B, jump).status is HostKeyStatus.UNKNOWN


def test_what_an_earlier_version_recorded_decides_until_its_mesh_is_known(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    home, work = KnownHost("h", 22, "gpu", "/home/mesh.yaml"), KnownHost("w", 22, "gpu", "/work/mesh.yaml")
    strict = partial(hostkeys.verify_host_key, known_hosts=known, policy=HostKeyPolicy.STRICT)
    known.write_text(f"{host_key_alias('gpu')} {A.public_key_text}\n@revoked * {RSA.public_key_text}\n")
    with pytest.raises(HostKeyChanged, match="from a version that did not tell meshes apart") as caught:
        strict(B, work)
    assert "trust gpu` records this key for this mesh" in (caught.value.hint or "")
    strict(A, home)
    lines = known.read_text().splitlines()
    assert lines[0].startswith("@revoked")
    assert [line.split()[0] for line in lines[1:]] == [home.own_name, "h"]
    with pytest.raises(HostKeyUnknown):
        strict(B, work)
    with pytest.raises(HostKeyChanged):
        strict(B, home)
    before = known.read_bytes()
    strict(A, home)
    assert known.read_bytes() == before


def verify(known: Path, key: HostKey, policy: HostKeyPolicy = HostKeyPolicy.STRICT) -> None:
    hostkeys.verify_host_key(key, KnownHost("1.2.3.4", 2222, "iceland"), known_hosts=known, policy=policy)


def test_strict_refuses_an_unknown_key_with_a_hint(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    with pytest.raises(HostKeyUnknown) as caught:
        verify(known, A)
    assert A.fingerprint in caught.value.message
    assert "gpumesh trust iceland" in (caught.value.hint or "")
    assert not known.exists()


def test_accept_new_records_the_unknown_and_refuses_the_changed(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    verify(known, A, HostKeyPolicy.ACCEPT_NEW)
    verify(known, A)
    before = known.read_bytes()
    with pytest.raises(HostKeyChanged) as caught:
        verify(known, B, HostKeyPolicy.ACCEPT_NEW)
    assert A.fingerprint in caught.value.message
    assert B.fingerprint in caught.value.message
    assert known.read_bytes() == before


def test_a_revoked_key_and_a_certificate_authority_raise_errors(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(
        f"@revoked * {A.public_key_text}\n"
        f"@cert-authority {known_hosts_address('1.2.3.4', 2222)} {RSA.public_key_text}\n"
    )
    with pytest.raises(HostKeyRevoked):
        verify(known, A, HostKeyPolicy.ACCEPT_NEW)
    with pytest.raises(HostKeyUnknown, match="certificate authority"):
        verify(known, B, HostKeyPolicy.ACCEPT_NEW)
