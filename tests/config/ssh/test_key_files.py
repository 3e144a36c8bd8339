from __future__ import annotations

import base64
from pathlib import Path

import pytest

from gpumesh.config.ssh.key_files import KeyKind, detect_key_kind, is_encrypted_openssh_key, read_public_key
from gpumesh.lab.keys import new_key
from tests.prerequisites import needs
from tests.tunnels.sshd import keygen


@needs("sshd")
@pytest.mark.parametrize("passphrase", ["", "secret"])
@pytest.mark.parametrize("algorithm", ["ed25519", "ecdsa", "rsa"])
def test_keys_of_ssh_keygen(tmp_path: Path, algorithm: str, passphrase: str) -> None:
    file = keygen(tmp_path / "key", kind=algorithm, passphrase=passphrase)
    assert detect_key_kind(file) is KeyKind.PRIVATE
    assert detect_key_kind(file.with_name("key.pub")) is KeyKind.PUBLIC


def test_other_forms(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text in ("-----BEGIN RSA PRIVATE KEY-----\nxx\n", "-----BEGIN OPENSSH PRIVATE KEY-----\n!!!\n", "", "\0" * 99):
        file.write_text(text)
        assert detect_key_kind(file) is KeyKind.PRIVATE, "the transport says what is wrong with it"
    file.write_text("sk-ssh-ed25519@openssh.com AAAA me\n")
    assert detect_key_kind(file) is KeyKind.PUBLIC
    file.write_text(new_key())
    assert detect_key_kind(file) is KeyKind.PRIVATE


def test_a_key_on_a_token(tmp_path: Path) -> None:
    """Made by hand: the magic, no encryption, and the public key's kind in the clear (PROTOCOL.key)."""
    import struct

    def text(data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + data

    public = text(b"sk-ssh-ed25519@openssh.com") + text(b"\0" * 32) + text(b"ssh:")
    blob = b"openssh-key-v1\0" + text(b"none") + text(b"none") + text(b"") + struct.pack(">I", 1) + text(public)
    body = base64.encodebytes(blob).decode()
    (tmp_path / "key").write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}-----END OPENSSH PRIVATE KEY-----\n")
    assert detect_key_kind(tmp_path / "key") is KeyKind.FIDO


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        detect_key_kind(tmp_path / "key")


@needs("sshd")
@pytest.mark.parametrize("passphrase", ["", "secret"])
def test_the_public_key_of_a_file(tmp_path: Path, passphrase: str) -> None:
    file = keygen(tmp_path / "key", passphrase=passphrase)
    public = tmp_path / "key.pub"
    blob = base64.b64decode(public.read_text().split()[1])
    assert read_public_key(file) == read_public_key(public) == blob
    assert is_encrypted_openssh_key(file.read_bytes()) is bool(passphrase)
    public.rename(tmp_path / "moved.pub")
    assert read_public_key(file) == blob  # in the clear, also in an encrypted file
    (tmp_path / "moved").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert read_public_key(tmp_path / "moved") == blob  # from the file beside it


def test_files_without_a_public_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    cut = base64.b64encode(b"openssh-key-v1\0" + b"\xff" * 9).decode()
    for text in ("", "ssh-ed25519", "ssh-ed25519 %%%", "\0" * 99, f"-----BEGIN OPENSSH PRIVATE KEY-----\n{cut}\n"):
        file.write_text(text)
        assert read_public_key(file) is None
        assert not is_encrypted_openssh_key(file.read_bytes())
    assert read_public_key(tmp_path / "none") is None
