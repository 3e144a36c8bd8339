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
    """A host's public key: its type by the SSH name, such as ``ssh-ed25519``, and its ``blob`` (SSH's wire form)."""

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
    """One line of a known_hosts file. ``marker`` is ``""``, ``REVOKED`` or ``CERTIFICATE_AUTHORITY``. ``hosts`` is the
    field of host names and patterns."""

    marker: str
    hosts: str
    key: HostKey

    @property
    def hashed(self) -> bool:
        """Whether the host's name is hashed (OpenSSH's ``HashKnownHosts``); such a line has one name."""
        return self.hosts.startswith("|1|")

    def matches(self, name: str) -> bool:
        """Whether the line is for ``name``: a ``host_key_alias`` or a ``known_hosts_address``."""
        if self.hashed:
            return _matches_hash(self.hosts, name)
        return matches_pattern_list(name.lower(), self.hosts.lower().split(","))


@dataclass(frozen=True, slots=True)
class KnownHosts:
    """The entries of a known_hosts file, in the order of its lines."""

    entries: tuple[KnownHostsEntry, ...] = ()

    @property
    def hashed(self) -> bool:
        """Whether this file has hashed names. Then new names are hashed as well."""
        return any(entry.hashed for entry in self.entries)

    def keys_for(self, name: str) -> tuple[HostKey, ...]:
        """The keys of the lines that match ``name`` and have no marker; each key once."""
        return tuple(dict.fromkeys(entry.key for entry in self.entries if not entry.marker and entry.matches(name)))

    def keys(self, *, node: str, host: str, port: int) -> tuple[HostKey, ...]:
        """The keys on record for the node; if there are none, the keys for its address."""
        return self.keys_for(host_key_alias(node)) or self.keys_for(known_hosts_address(host, port))

    def key_types(self, *, node: str, host: str, port: int) -> tuple[str, ...]:
        """The types of the keys on record. We ask the host for these types first: otherwise the host might offer a key
        of another type, which is not on record."""
        return tuple(dict.fromkeys(key.key_type for key in self.keys(node=node, host=host, port=port)))


def known_hosts_address(host: str, port: int) -> str:
    """An address in the form of known_hosts: with the port only if the port is not 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def host_key_alias(node: str) -> str:
    """A node's name in known_hosts. Special characters become ``%HEX``, so that no node's name is read as a pattern."""
    escaped = re.sub(r"[^a-z0-9._-]", lambda match: f"%{ord(match.group()):x}", node.lower())
    return f"gpumesh-node-{escaped}"


def parse_known_hosts(text: str) -> KnownHosts:
    """The entries of a file. Lines that OpenSSH cannot read either are left out."""
    entries = [_parse_line(line) for line in _split_lines(text)]
    return KnownHosts(tuple(entry for entry in entries if entry is not None))


def _split_lines(text: str) -> list[str]:
    """Splits at newlines only. ``splitlines`` would also split at form feeds and other characters."""
    return text.removesuffix("\n").split("\n") if text else []


def _parse_line(line: str) -> KnownHostsEntry | None:
    """The entry in a line: ``[@marker] hosts key-type base64-key [comment]``. ``None`` for an empty line, for a comment
    and for a line that OpenSSH cannot read either."""
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
    hosts, key_type, encoded_key = fields[:3]
    try:
        blob = base64.b64decode(encoded_key, validate=True)
    except (binascii.Error, ValueError):
        return None
    return KnownHostsEntry(marker, hosts, HostKey(key_type, blob))


def _matches_hash(hosts: str, name: str) -> bool:
    """Whether ``hosts``, in the form that ``_hash_name`` returns, is the hash of ``name``."""
    try:
        _, _, salt, digest = hosts.split("|")
        expected = base64.b64decode(digest)
        computed = hmac.new(base64.b64decode(salt), name.encode(), "sha1").digest()
    except (ValueError, binascii.Error):  # a malformed line: not four fields, or no base64
        return False
    return hmac.compare_digest(expected, computed)


def _hash_name(name: str) -> str:
    """The hash of a host's name in OpenSSH's form: ``|1|SALT|DIGEST``, both in base64."""
    salt = secrets.token_bytes(20)
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


# -- files -----------------------------------------------------------------------------------------------------------


def read_known_hosts(path: Path) -> KnownHosts:
    """Reads and parses a known_hosts file; a file that does not exist is empty. Raises ``TunnelError``."""
    return parse_known_hosts(_read_text(path.expanduser()))


def record_host_key(path: Path, key: HostKey, *, node: str, host: str, port: int) -> None:
    """Records ``key`` for a node's name and for its address, and removes the other keys of these two names.

    A jump host is no node: then ``node`` is "", and the key is recorded for the address only.

    Other lines stay as they are. The file is replaced as a whole (0600) under a lock, so that neither a crash nor a
    second writer loses a line. Raises ``TunnelError`` when the file cannot be written, or is no known_hosts file.
    """
    path = path.expanduser()
    address = known_hosts_address(host, port)
    names = (host_key_alias(node), address) if node else (address,)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = Path(os.path.realpath(path))  # a link stays a link, and its target is replaced
        with file_lock.locked_folder(target.parent):
            ensure_known_hosts_file(target)
            lines = _replace_keys(_read_text(target), key, names)
            atomic_file.replace(target, "".join(lines), errors="surrogateescape")  # the reverse of ``_read_text``
    except OSError as error:
        raise TunnelError(
            f"known_hosts file {path} cannot be written: {error.strerror}", hint="check the folder's owner and mode"
        ) from error


def ensure_known_hosts_file(path: Path) -> None:
    """Raises ``TunnelError`` for a file that is no known_hosts file: it has lines other than comments, and none of them
    is a host's key. A missing or empty file is accepted.

    Called before we write into the file: in another person's mesh.yaml, ``known_hosts`` may name a shell's start-up
    file.
    """
    text = _read_text(path.expanduser())
    lines = [line for line in _split_lines(text) if line.strip() and not line.lstrip().startswith("#")]
    if lines and all(_parse_line(line) is None for line in lines):
        raise TunnelError(f"{path} is no known_hosts file: nothing is recorded in it", hint="correct `ssh.known_hosts`")


def _read_text(path: Path) -> str:
    """The text of a file; empty if there is no file. Raises ``TunnelError`` if it is too large or cannot be read."""
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
    return raw.decode("utf-8", "surrogateescape")  # bytes that are no text are later written back unchanged


def _replace_keys(text: str, key: HostKey, names: tuple[str, ...]) -> Iterator[str]:
    """Yields the lines of the new file: ``text`` without the present keys of ``names``, then a line with ``key`` for
    each of ``names``. Lines with a marker (``@revoked``) stay. Each line has its newline."""
    for line in _split_lines(text):
        entry = _parse_line(line)
        matching_names: set[str] = set()
        if entry is not None and not entry.marker:
            matching_names = {name.lower() for name in names if entry.matches(name)}
        if entry is None or not matching_names:
            yield line + "\n"
            continue
        # The other hosts of a line (``a,b ssh-ed25519 …``) and its patterns keep the key. A hashed line has one name
        # only, so the whole line goes.
        other_hosts = [host for host in entry.hosts.split(",") if host.lower() not in matching_names]
        if other_hosts and not entry.hashed:
            yield f"{','.join(other_hosts)} {entry.key.public_key_text}\n"
    file_has_hashes = parse_known_hosts(text).hashed
    for name in names:
        recorded_name = _hash_name(name) if file_has_hashes else name
        yield f"{recorded_name} {key.public_key_text}\n"
