"""Makes SSH keys for simulated hosts and their user, and the lines of authorized_keys and known_hosts for these keys.

Each lab makes new keys; the person's own keys are never used.
"""

from __future__ import annotations

import base64
import binascii
import io

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

LOOPBACK_HOST = "127.0.0.1"


def new_key(kind: str = "ed25519") -> str:
    """Makes a new private key (``ed25519`` or ``rsa``), as text in OpenSSH's format without a passphrase.

    Raises ``ValueError`` for any other kind.
    """
    private_key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
    if kind == "ed25519":
        private_key = ed25519.Ed25519PrivateKey.generate()
    elif kind == "rsa":
        private_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    else:
        raise ValueError(f"no such kind of key: {kind!r}")
    return private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ).decode()


def parse_private_key(private_key: str) -> paramiko.PKey:
    """Makes paramiko's key of a text that ``new_key`` has made."""
    if public_key_line(private_key).startswith("ssh-rsa "):
        return paramiko.RSAKey.from_private_key(io.StringIO(private_key))
    return paramiko.Ed25519Key.from_private_key(io.StringIO(private_key))


def parse_public_key(line: str) -> paramiko.PKey:
    """Reads the key in a line of authorized_keys (type, key, comment). Raises ``ValueError`` for any other text."""
    key_type, _, key_and_comment = line.strip().partition(" ")
    encoded_key, _, _comment = key_and_comment.partition(" ")
    try:
        return paramiko.PKey.from_type_string(key_type, base64.b64decode(encoded_key, validate=True))
    except (binascii.Error, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as error:
        raise ValueError(f"not a public key: {line[:40]!r}") from error


def public_key_line(private_key: str) -> str:
    """The public half of a private key, as a line of authorized_keys: its type and the key in base64."""
    loaded_key = serialization.load_ssh_private_key(private_key.encode(), password=None)
    public_key = loaded_key.public_key()
    return public_key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def known_hosts_line(host_key: str, port: int, host: str = LOOPBACK_HOST) -> str:
    """The line of known_hosts for a server with the private key ``host_key``. OpenSSH writes only port 22 plainly."""
    name = host if port == 22 else f"[{host}]:{port}"
    return f"{name} {public_key_line(host_key)}"
