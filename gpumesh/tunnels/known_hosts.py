"""Parses, searches and writes known_hosts files as OpenSSH does (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).

hostkeys.py decides what an entry means for a connection.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpumesh import atomic_file, file_lock
from gpumesh.config.ssh.patterns import matches_pattern_list
from gpumesh.errors import TunnelError

SIZE_LIMIT = 16 << 20  # bytes; no real file is so large, and a device file has no end
REVOKED, CERTIFICATE_AUTHORITY = "@revoked", "@cert-authority"


@dataclass(frozen=True, slots=True)
class HostKey:
    """A host's public key. ``key_type`` is the SSH name of its type (``ssh-ed25519``), ``blob`` its wire form."""

    key_type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint in the form of ``ssh-keygen -l``."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def public_key_text(self) -> str:
        """The type and the key, as the last two fields of a known_hosts line."""
        return f"{self.key_type} {base64.b64encode(self.blob).decode()}"


@dataclass(frozen=True, slots=True)
class KnownHostsEntry:
    """One line. ``marker`` is ``""``, ``REVOKED`` or ``CERTIFICATE_AUTHORITY``. ``hosts`` is the field of host names
    and patterns."""

    marker: str
    hosts: str
    key: HostKey

    @property
    def hashed(self) -> bool:
        """Whether the host's name is hashed (OpenSSH's ``HashKnownHosts``); such a line has one name."""
        return self.hosts.startswith("|1|")

    def matches(self, name: str) -> bool:
        if self.hashed:
            return _matches_hash(self.hosts, name)
        return matches_pattern_list(name.lower(), self.hosts.lower().split(","))


@dataclass(frozen=True, slots=True)
class KnownHosts:
    """The lines of a file, in order."""

    entries: tuple[KnownHostsEntry, ...] = ()

    @property
    def hashed(self) -> bool:
        """Whether this file has hashed names. Then new names are hashed as well."""
        return any(entry.hashed for entry in self.entries)

    def keys_for(self, name: str) -> tuple[HostKey, ...]:
        """The keys of the lines that match ``name`` and have no marker; each key once."""
        return tuple(dict.fromkeys(entry.key for entry in self.entries if not entry.marker and entry.matches(name)))

    def keys(self, *, node: str, host: str, port: int) -> tuple[HostKey, ...]:
        """The keys on record for the node; if there are none, those for its address."""
        return self.keys_for(host_key_alias(node)) or self.keys_for(known_hosts_address(host, port))

    def key_types(self, *, node: str, host: str, port: int) -> tuple[str, ...]:
        """The types of the keys on record. The host is asked for these first: otherwise it might offer a key of another
        type, which is not on record."""
        return tuple(dict.fromkeys(key.key_type for key in self.keys(node=node, host=host, port=port)))


def known_hosts_address(host: str, port: int) -> str:
    """An address in the form of known_hosts: with the port only if the port is not 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def host_key_alias(node: str) -> str:
    """A node's name in known_hosts. Other characters are escaped, so that no node's name is read as a pattern."""
    safe = re.sub(r"[^a-z0-9._-]", lambda match: f"%{ord(match.group()):x}", node.lower())
    return f"gpumesh-node-{safe}"


def parse_known_hosts(text: str) -> KnownHosts:
    """The entries of a file. Lines that OpenSSH cannot read either are left out."""
    return KnownHosts(tuple(entry for line in _split_lines(text) if (entry := _parse_line(line)) is not None))


def _split_lines(text: str) -> list[str]:
    """Splits at newlines only. ``splitlines`` would also split at form feeds and other characters."""
    return text.removesuffix("\n").split("\n") if text else []


def _parse_line(line: str) -> KnownHostsEntry | None:
    fields = line.split()
    if not fields or fields[0].startswith("#"):
        return None
    marker = ""
    if fields[0].startswith("@"):
        marker, *fields = fields
        if marker not in (REVOKED, CERTIFICATE_AUTHORITY):
            return None
    if len(fields) < 3:
        return None
    try:
        blob = base64.b64decode(fields[2], validate=True)
    except (binascii.Error, ValueError):
        return None
    return KnownHostsEntry(marker, fields[0], HostKey(fields[1], blob))


def _matches_hash(hosts: str, name: str) -> bool:
    try:
        _, _, salt, digest = hosts.split("|")
        expected = base64.b64decode(digest)
        computed = hmac.new(base64.b64decode(salt), name.encode(), "sha1").digest()
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(expected, computed)


def _hash_name(name: str) -> str:
    salt = secrets.token_bytes(20)
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


# -- files -----------------------------------------------------------------------------------------------------------


def read_known_hosts(path: Path) -> KnownHosts:
    """A file that does not exist is empty. Raises ``TunnelError`` when it cannot be read."""
    return parse_known_hosts(_read_text(path.expanduser()))


def record_host_key(path: Path, key: HostKey, *, node: str, host: str, port: int) -> None:
    """Records ``key`` for this node and this address, and drops other keys of these two names. For a jump host, which
    is no node, ``node`` is "", and only its address is recorded.

    Other lines stay as they are. The file is replaced as a whole (0600) under a lock, so that neither a crash nor a
    second writer loses a line. Raises ``TunnelError`` when that fails.
    """
    path = path.expanduser()
    names = (*((host_key_alias(node),) if node else ()), known_hosts_address(host, port))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = Path(os.path.realpath(path))  # a link stays a link, and its target is replaced
        with file_lock.locked_folder(target.parent):
            ensure_known_hosts_file(target)
            lines = _replace_keys(_read_text(target), key, names)
            atomic_file.replace(target, "".join(lines), errors="surrogateescape")
    except OSError as error:
        raise TunnelError(
            f"known_hosts file {path} cannot be written: {error.strerror}", hint="check the folder's owner and mode"
        ) from error


def ensure_known_hosts_file(path: Path) -> None:
    """Raises ``TunnelError`` for a file that has lines other than comments, but no host's key.

    Called before anything is written: in another person's mesh.yaml, ``known_hosts`` may name a shell's start-up file.
    """
    text = _read_text(path.expanduser())
    lines = [line for line in _split_lines(text) if line.strip() and not line.lstrip().startswith("#")]
    if lines and all(_parse_line(line) is None for line in lines):
        raise TunnelError(f"{path} is no known_hosts file: nothing is recorded in it", hint="correct `ssh.known_hosts`")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise TunnelError(
            f"known_hosts file {path} cannot be read: {error.strerror}", hint="check the file's owner and mode"
        ) from error
    if len(raw) > SIZE_LIMIT:
        raise TunnelError(f"known_hosts file {path} has more than {SIZE_LIMIT >> 20} MiB")
    return raw.decode("utf-8", "surrogateescape")  # so that bytes that are no text are written back unchanged


def _replace_keys(text: str, key: HostKey, names: tuple[str, ...]) -> Iterator[str]:
    """Yields the lines of the new file, each with its newline."""
    hashed = parse_known_hosts(text).hashed
    for line in _split_lines(text):
        entry = _parse_line(line)
        matching = [] if entry is None or entry.marker else [name for name in names if entry.matches(name)]
        if entry is None or not matching:
            yield line + "\n"
            continue
        # The other hosts of a line (``a,b ssh-ed25519 …``) and its patterns keep the key. A hashed line has one name.
        replaced = {name.lower() for name in matching}
        others = [host for host in entry.hosts.split(",") if host.lower() not in replaced]
        if others and not entry.hashed:
            yield f"{','.join(others)} {entry.key.public_key_text}\n"
    for name in names:
        yield f"{_hash_name(name) if hashed else name} {key.public_key_text}\n"
