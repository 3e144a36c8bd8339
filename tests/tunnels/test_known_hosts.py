"""known_hosts files, read and written as OpenSSH does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.errors import TunnelError
from gpumesh.tunnels.known_hosts import (
    HostKey,
    KnownHost,
    KnownHosts,
    adopt_shared_keys,
    forget_node,
    host_key_alias,
    parse_known_hosts,
    read_known_hosts,
    record_host_key,
)
from tests.tunnels.sshd import keygen, needs_sshd

A = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"A" * 32)


B = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0 " + b"B" * 32)


RSA = HostKey("ssh-rsa", b"\0\0\0\x07ssh-rsa" + b"R" * 64)


def test_key_types_are_those_on_record() -> None:
    known = parse_known_hosts(
        f"1.2.3.4 {RSA.public_key_text}\n1.2.3.4 {A.public_key_text}\n"
        f"1.2.3.4 {B.public_key_text}\n@revoked 1.2.3.4 x x\n"
    )
    assert known.key_types(KnownHost("1.2.3.4", 22, "n")) == ("ssh-rsa", "ssh-ed25519")
    assert known.key_types(KnownHost("5.6.7.8", 22, "n")) == ()


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
    assert hashed.keys(KnownHost("1.2.3.4", 2222, "n")) == (key,)
    assert hashed.keys(KnownHost("1.2.3.4", 22, "n")) == ()
    record_host_key(known, key, KnownHost("5.6.7.8", 22, "n"))
    assert "5.6.7.8" not in known.read_text()
    search = subprocess.run(["ssh-keygen", "-F", "5.6.7.8", "-f", str(known)], capture_output=True, check=False)
    assert search.returncode == 0


def test_record_replaces_the_keys_of_its_names_only(tmp_path: Path) -> None:
    known = tmp_path / "deep" / "known_hosts"
    record_host_key(known, A, KnownHost("1.2.3.4", 13323, "iceland"))
    assert known.stat().st_mode & 0o777 == 0o600
    assert known.parent.stat().st_mode & 0o777 == 0o700
    others = (
        f"# mine\nother,[1.2.3.4]:13323 {A.public_key_text} note\n@revoked * {RSA.public_key_text}\ngarbage\x0bline\n"
    )
    known.write_text(others + known.read_text())
    known.chmod(0o644)
    record_host_key(known, B, KnownHost("1.2.3.4", 13323, "iceland"))
    lines = known.read_text().split("\n")
    assert lines[:4] == ["# mine", f"other {A.public_key_text}", f"@revoked * {RSA.public_key_text}", "garbage\x0bline"]
    assert lines[4:] == [f"gpumesh-node-iceland {B.public_key_text}", f"[1.2.3.4]:13323 {B.public_key_text}", ""]
    assert known.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in known.parent.iterdir()] == ["known_hosts"]  # no temporary file is left
    before = known.read_bytes()
    record_host_key(known, B, KnownHost("1.2.3.4", 13323, "iceland"))
    assert known.read_bytes() == before


@pytest.mark.parametrize("hashed", [False, True])
def test_adopting_moves_the_keys_of_the_shared_name(tmp_path: Path, hashed: bool) -> None:
    known, node = tmp_path / "known_hosts", KnownHost("1.2.3.4", 22, "n", "/mesh.yaml")
    adopt_shared_keys(known, node)
    adopt_shared_keys(known, KnownHost("1.2.3.4", 22, "n"))
    adopt_shared_keys(known, KnownHost("1.2.3.4", 22))
    assert read_known_hosts(known) == KnownHosts(), "there was nothing to adopt"
    record_host_key(known, A, KnownHost("1.2.3.4", 22, "n"))  # as an earlier version did
    known.write_text(known.read_text() + f"{node.shared_name} {RSA.public_key_text}\n")
    if hashed:
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], capture_output=True, check=True, timeout=20)
    adopt_shared_keys(known, node)
    adopted = read_known_hosts(known)
    assert adopted.hashed is hashed
    assert adopted.keys_for(node.own_name or "") == (A, RSA)
    assert adopted.keys_for(node.shared_name or "") == ()
    assert adopted.keys_for(node.address) == (A,), "what is on record for the address stays"
    assert len(adopted.entries) == 3


def test_recording_the_key_of_the_shared_name_takes_its_place(tmp_path: Path) -> None:
    known, node = tmp_path / "known_hosts", KnownHost("1.2.3.4", 22, "n", "/mesh.yaml")
    known.write_text(f"{node.shared_name},other {A.public_key_text}\n{node.shared_name} {B.public_key_text}\n")
    record_host_key(known, A, node)
    assert [line.split()[0] for line in known.read_text().splitlines()] == [
        "other",
        node.shared_name,  # with the other key: of another host, perhaps of another mesh
        node.own_name,
        "1.2.3.4",
    ]


def test_record_keeps_a_link_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"# caf\xe9\n")
    link = tmp_path / "known_hosts"
    link.symlink_to(real)
    record_host_key(link, A, KnownHost("h", 22, "n"))
    assert link.is_symlink()
    assert real.read_bytes().startswith(b"# caf\xe9\n")
    assert read_known_hosts(link).keys(KnownHost("h", 22, "n")) == (A,)


def test_files_that_cannot_be_read_or_written_raise_errors(tmp_path: Path) -> None:
    assert read_known_hosts(tmp_path / "none") == KnownHosts()
    with pytest.raises(TunnelError, match="cannot be read"):
        read_known_hosts(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TunnelError, match="cannot be written"):
        record_host_key(tmp_path / "file" / "known_hosts", A, KnownHost("h", 22, "n"))


RECORD_MANY = """
import sys
from pathlib import Path
from gpumesh.tunnels.known_hosts import HostKey, KnownHost, record_host_key
for number in range(10):
    name = f"{sys.argv[2]}{number}"
    record_host_key(Path(sys.argv[1]), HostKey("ssh-ed25519", b"key"), KnownHost(name, 22, name))
"""


def test_concurrent_writers_lose_no_line(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    writers = [
        subprocess.Popen([sys.executable, "-c", RECORD_MANY, str(known), name], cwd=Path(__file__).parents[2])
        for name in "ab"
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert len(read_known_hosts(known).entries) == 40


def test_the_keys_of_a_removed_node_are_forgotten_and_those_of_its_address_stay(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    forget_node(known, KnownHost("1.2.3.4", 22, "pod", "/mesh.yaml"))
    assert not known.exists()
    record_host_key(known, A, KnownHost("1.2.3.4", 22, "pod", "/mesh.yaml"))
    record_host_key(known, B, KnownHost("5.6.7.8", 22, "pod", "/other.yaml"))
    forget_node(known, KnownHost("1.2.3.4", 22, "pod", "/mesh.yaml"))
    kept = read_known_hosts(known)
    assert kept.keys_for(host_key_alias("pod", "/mesh.yaml")) == ()
    assert kept.keys_for("1.2.3.4") == (A,)
    assert kept.keys_for(host_key_alias("pod", "/other.yaml")) == (B,)
