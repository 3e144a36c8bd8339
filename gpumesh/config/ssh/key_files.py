"""Detects the kind of a private key file from its unencrypted part, without a passphrase."""

from __future__ import annotations

import base64
import binascii
from enum import StrEnum
from pathlib import Path

_LIMIT = 64 * 1024
_MAGIC = b"openssh-key-v1\x00"


class KeyKind(StrEnum):
    PRIVATE = "private"
    PUBLIC = "public"
    FIDO = "fido"


def detect_key_kind(path: Path) -> KeyKind:
    """``FIDO``: the secret is on a token (sk-ssh-ed25519, sk-ecdsa). Raises OSError.

    An OpenSSH key file carries the public key in the clear before the encrypted part (PROTOCOL.key).
    """
    with path.open("rb") as file:
        data = file.read(_LIMIT)
    if data.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        return KeyKind.PUBLIC
    lines = data.splitlines()
    if lines and lines[0].strip() == b"-----BEGIN OPENSSH PRIVATE KEY-----":
        try:
            blob = base64.b64decode(b"".join(line for line in lines if not line.startswith(b"-----")))
        except binascii.Error:
            return KeyKind.PRIVATE
        head = blob.removeprefix(_MAGIC)[:2048]
        if b"sk-ssh-ed25519@openssh.com" in head or b"sk-ecdsa-sha2-nistp256@openssh.com" in head:
            return KeyKind.FIDO
    return KeyKind.PRIVATE
