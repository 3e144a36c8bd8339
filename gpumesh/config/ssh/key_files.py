"""Reads the unencrypted part of a key file, without a passphrase: its kind (private, public, on a FIDO token) and its
public key."""

from __future__ import annotations

import base64
import binascii
from enum import StrEnum
from pathlib import Path

_MAX_BYTES = 64 * 1024  # of a file; even an RSA key of 16384 bits has fewer
_HEAD_BYTES = 2048  # of the decoded key; the type of the public key stands in them
_MAGIC = b"openssh-key-v1\x00"  # the decoded key begins with it


class KeyKind(StrEnum):
    PRIVATE = "private"
    PUBLIC = "public"
    FIDO = "fido"  # the secret is on a security token (sk-ssh-ed25519, sk-ecdsa)


def read_key_file(path: Path) -> bytes:
    """Returns the bytes of a key file, at most ``_MAX_BYTES``. Raises OSError."""
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def detect_key_kind(path: Path) -> KeyKind:
    """Returns the kind of the key in the file. A file that cannot be decoded counts as ``PRIVATE``. Raises OSError.

    An OpenSSH key file carries the public key in the clear before the encrypted part (PROTOCOL.key).
    """
    data = read_key_file(path)
    if data.startswith((b"ssh-", b"ecdsa-", b"sk-")):  # a public key begins with its type, such as ssh-ed25519
        return KeyKind.PUBLIC
    head = _decode_openssh_key(data)[:_HEAD_BYTES]
    if b"sk-ssh-ed25519@openssh.com" in head or b"sk-ecdsa-sha2-nistp256@openssh.com" in head:
        return KeyKind.FIDO
    return KeyKind.PRIVATE


def is_public_key(path: Path) -> bool:
    """Whether the file holds a public key. False for a file that cannot be read."""
    try:
        return detect_key_kind(path) is KeyKind.PUBLIC
    except OSError:
        return False


def read_public_key(path: Path) -> bytes | None:
    """Returns the public key that belongs to a key file, in SSH's binary form; ``None``: nothing in the clear says it.

    As ssh does, it looks into the file (a public key, or a private key in OpenSSH's form) and then into ``PATH.pub``.
    """
    for file in (path, path.with_name(path.name + ".pub")):
        try:
            data = read_key_file(file)
        except OSError:
            continue
        public_key = _decode_public_line(data) or _find_public_key(_decode_openssh_key(data))
        if public_key is not None:
            return public_key
    return None


def is_encrypted_openssh_key(data: bytes) -> bool:
    """Whether a key in OpenSSH's form needs a passphrase. False for bytes that are no such key."""
    cipher, _rest = _read_string(_decode_openssh_key(data))
    return cipher not in (b"", b"none")


def _decode_openssh_key(data: bytes) -> bytes:
    """The decoded content of a private key file in OpenSSH's form, after its magic; empty for any other bytes."""
    lines = data.strip().splitlines()
    if not lines or lines[0].strip() != b"-----BEGIN OPENSSH PRIVATE KEY-----":
        return b""
    base64_lines = [line for line in lines if not line.startswith(b"-----")]
    try:
        decoded_key = base64.b64decode(b"".join(base64_lines))
    except binascii.Error:  # no base64
        return b""
    return decoded_key.removeprefix(_MAGIC)


def _find_public_key(content: bytes) -> bytes | None:
    """The public key in the decoded content of a private key file; ``None`` if it is cut or empty."""
    for _field in ("cipher", "key derivation", "its options"):
        _text, content = _read_string(content)
    public_key, _private_part = _read_string(content[4:])  # 4: the number of keys, which is always 1
    return public_key or None


def _read_string(data: bytes) -> tuple[bytes, bytes]:
    """The first string of ``data`` in SSH's form (four bytes with its length, then its bytes), and the rest. Both are
    empty if the string is cut."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 + length:
        return b"", b""
    return data[4 : 4 + length], data[4 + length :]


def _decode_public_line(data: bytes) -> bytes | None:
    """The key in a line such as ``ssh-ed25519 AAAA… comment``; ``None`` for any other bytes."""
    words = data.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith((b"ssh-", b"ecdsa-", b"sk-")):
        return None
    try:
        return base64.b64decode(words[1], validate=True)
    except binascii.Error:
        return None
