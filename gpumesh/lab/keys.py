"""The keys of simulated hosts and of their user. Each lab makes new keys; the person's own keys are never used."""

from __future__ import annotations

import io

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

LOOPBACK_HOST = "127.0.0.1"


def new_key(kind: str = "ed25519") -> str:
    """A private key (``ed25519`` or ``rsa``) in OpenSSH's format."""
    private: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
    if kind == "ed25519":
        private = ed25519.Ed25519PrivateKey.generate()
    elif kind == "rsa":
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    else:
        raise ValueError(f"no such kind of key: {kind!r}")
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ).decode()


def parse_private_key(text: str) -> paramiko.PKey:
    """A private key in OpenSSH's format. Raises ``paramiko.SSHException`` for anything else."""
    if b"ssh-rsa" in _public_part(text):
        return paramiko.RSAKey.from_private_key(io.StringIO(text))
    return paramiko.Ed25519Key.from_private_key(io.StringIO(text))


def public_key_line(text: str) -> str:
    """The public half of a private key, as a line of ``authorized_keys``."""
    return _public_part(text).decode()


def known_hosts_line(host_key: str, port: int, host: str = LOOPBACK_HOST) -> str:
    name = host if port == 22 else f"[{host}]:{port}"
    return f"{name} {public_key_line(host_key)}"


def _public_part(text: str) -> bytes:
    private = serialization.load_ssh_private_key(text.encode(), password=None)
    return private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
