"""Detects the kind of a key file (private, public, on a FIDO token) from its unencrypted part, without a passphrase."""

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


def detect_key_kind(path: Path) -> KeyKind:
    """Returns the kind of the key in the file. A file that cannot be decoded counts as ``PRIVATE``. Raises OSError.

    An OpenSSH key file carries the public key in the clear before the encrypted part (PROTOCOL.key).
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES)
    if data.startswith((b"ssh-", b"ecdsa-", b"sk-")):  # a public key begins with its type, such as ssh-ed25519
        return KeyKind.PUBLIC
    lines = data.splitlines()
    if lines and lines[0].strip() == b"-----BEGIN OPENSSH PRIVATE KEY-----":
        base64_lines = [line for line in lines if not line.startswith(b"-----")]
        try:
            decoded_key = base64.b64decode(b"".join(base64_lines))
        except binascii.Error:  # no base64
            return KeyKind.PRIVATE
        head = decoded_key.removeprefix(_MAGIC)[:_HEAD_BYTES]
        if b"sk-ssh-ed25519@openssh.com" in head or b"sk-ecdsa-sha2-nistp256@openssh.com" in head:
            return KeyKind.FIDO
    return KeyKind.PRIVATE
