"""Loads private keys from files in all forms that ssh reads, and the certificates beside them."""

from __future__ import annotations

import io
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from gpumesh.config.ssh import key_files
from gpumesh.errors import KeyUnreadable
from gpumesh.text.printable import printable

_OPENSSH_MARK = b"-----BEGIN OPENSSH PRIVATE KEY-----"


class PassphraseNeeded(KeyUnreadable):
    """The key file is encrypted, and no passphrase was given."""


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """Loads a private key, and the certificate ``PATH-cert.pub`` if there is one.

    Raises ``PassphraseNeeded`` and ``KeyUnreadable``.
    """
    key = _read_private_key(path, passphrase)
    add_certificate(key, path)
    return key


def add_certificate(key: paramiko.PKey, path: Path) -> None:
    """Makes ``key``, whose file is ``path``, log in with the certificate ``PATH-cert.pub`` if there is one. Raises
    ``KeyUnreadable``."""
    certificate = path.expanduser().with_name(path.name + "-cert.pub")
    try:
        if certificate.exists():
            key.load_certificate(str(certificate))
    except (paramiko.SSHException, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else printable(str(error), 120)
        raise KeyUnreadable(
            f"certificate {certificate} cannot be used with its key: {reason or type(error).__name__}",
            hint="sign the key again, or move the certificate away; check its owner and mode",
        ) from error


def _read_private_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """Loads a private key. Raises ``PassphraseNeeded`` and ``KeyUnreadable``."""
    try:
        data = key_files.read_key_file(path.expanduser())
    except FileNotFoundError as error:
        raise KeyUnreadable(f"there is no key file {path}", hint="check `ssh.identity_file`") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise KeyUnreadable(f"key file {path} cannot be read: {reason}", hint="check its owner and mode") from error
    if not _is_encrypted(data):
        passphrase = None  # a passphrase that the file does not need would be an error
    elif passphrase is None:
        raise PassphraseNeeded(
            f"key file {path} needs a passphrase",
            hint="name its variable in `ssh.passphrase_env`, or add the key to your agent (`ssh-add`)",
        )
    try:
        return _decode_key(data, passphrase)
    except (paramiko.SSHException, UnsupportedAlgorithm, ValueError, TypeError) as error:
        if passphrase is not None:
            raise KeyUnreadable(
                f"key file {path} does not open with the passphrase given",
                hint="check the variable that `ssh.passphrase_env` names",
            ) from error
        raise KeyUnreadable(
            f"key file {path} is not a private key that can be used",
            hint="for a FIDO key or another new kind use `transport: openssh`",
        ) from error


def _is_encrypted(data: bytes) -> bool:
    """Whether a passphrase is needed for the key in these bytes of a file. False for bytes that are no key."""
    if data.lstrip().startswith(_OPENSSH_MARK):
        return key_files.is_encrypted_openssh_key(data)
    head = data[:1000]  # PKCS#8, and the old form with its header "Proc-Type: 4,ENCRYPTED"
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in head or b"4,ENCRYPTED" in head


def _decode_key(data: bytes, passphrase: str | None) -> paramiko.PKey:
    """The key in OpenSSH's form, in PKCS#8, or in the old forms of OpenSSL.

    Raises ValueError, TypeError, ``UnsupportedAlgorithm`` or ``SSHException``, also for a wrong passphrase.
    """
    password = None if passphrase is None else passphrase.encode()
    load = serialization.load_pem_private_key
    if data.lstrip().startswith(_OPENSSH_MARK):
        load = serialization.load_ssh_private_key
    key = load(data.strip() + b"\n", password)
    key_class: type[paramiko.PKey]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        key_class = paramiko.Ed25519Key
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        key_class = paramiko.ECDSAKey
    elif isinstance(key, rsa.RSAPrivateKey):
        key_class = paramiko.RSAKey
    else:
        raise UnsupportedAlgorithm("another type of key")
    # paramiko makes a key from a text only, and reads OpenSSH's form for every type.
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return key_class.from_private_key(io.StringIO(text.decode("ascii")))
