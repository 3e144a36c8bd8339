"""Parses, searches and writes known_hosts files as OpenSSH does (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).

hostkeys.py decides what an entry means for a connection.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpumesh.config.ssh.patterns import matches_pattern_list
from gpumesh.errors import TunnelError
from gpumesh.files import atomic_file, file_lock

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
        """Whether the line is for ``name``, one of ``KnownHost.names``."""
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

    def deciding_name(self, host: KnownHost) -> str | None:
        """The first of the host's names that has keys on record; ``None``: there is no such name."""
        return next((name for name in host.names if self.keys_for(name)), None)

    def keys(self, host: KnownHost) -> tuple[HostKey, ...]:
        """The keys on record for the host, under its deciding name."""
        name = self.deciding_name(host)
        return () if name is None else self.keys_for(name)

    def key_types(self, host: KnownHost) -> tuple[str, ...]:
        """The types of the keys on record. We ask the host for these types first: otherwise the host might offer a key
        of another type, which is not on record."""
        return tuple(dict.fromkeys(key.key_type for key in self.keys(host)))


@dataclass(frozen=True, slots=True)
class KnownHost:
    """A host, and the names under which a known_hosts file may have its key.

    ``node`` is the name of its node in mesh.yaml; "" for a jump host, which is no node. ``mesh`` is the
    ``Topology.identity`` of the node's mesh; "" for a node that belongs to no mesh.
    """

    host: str
    port: int
    node: str = ""
    mesh: str = ""

    @property
    def address(self) -> str:
        """The name by which ssh itself knows the host."""
        return known_hosts_address(self.host, self.port)

    @property
    def own_name(self) -> str | None:
        """The name of the node in its mesh, which the node keeps wherever it moves. ``None`` for a jump host."""
        return host_key_alias(self.node, self.mesh) if self.node else None

    @property
    def shared_name(self) -> str | None:
        """The name that earlier versions gave to the nodes of this name in all meshes of the user. ``None`` for a node
        that belongs to no mesh, whose own name this is, and for a jump host."""
        return host_key_alias(self.node) if self.node and self.mesh else None

    @property
    def names(self) -> tuple[str, ...]:
        """All names. The first that has keys on record decides."""
        return tuple(name for name in (self.own_name, self.shared_name, self.address) if name is not None)


def known_hosts_address(host: str, port: int) -> str:
    """An address in the form of known_hosts: with the port only if the port is not 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def host_key_alias(node: str, mesh: str = "") -> str:
    """The name in known_hosts of a node of ``mesh``. Two meshes may have a node of the same name on different hosts.
    Without ``mesh``, it is the name that earlier versions used for all meshes.

    Special characters become ``%HEX``, so that no node's name is read as a pattern. ``mesh`` becomes a hash, because it
    may be a long path.
    """
    escaped = re.sub(r"[^a-z0-9._-]", lambda match: f"%{ord(match.group()):x}", node.lower())
    if not mesh:
        return f"gpumesh-node-{escaped}"
    mesh_hash = hashlib.sha256(mesh.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"gpumesh-mesh-{mesh_hash}-node-{escaped}"


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


def read_known_hosts(path: Path, *more: Path) -> KnownHosts:
    """Reads and parses known_hosts files; a file that does not exist is empty. Raises ``TunnelError`` if the first
    cannot be read; of the others, ssh leaves out such files without a word, and so does this."""
    entries = parse_known_hosts(_read_text(path.expanduser())).entries
    for file in more:
        with contextlib.suppress(TunnelError):
            entries += parse_known_hosts(_read_text(file.expanduser())).entries
    return KnownHosts(entries)


def record_host_key(path: Path, key: HostKey, host: KnownHost) -> None:
    """Records ``key`` for the host's own name and for its address, and removes the other keys of these two names. The
    key for a jump host is recorded for its address only.

    If an earlier version has recorded the same key for the shared name, this line goes: the own name takes its place.
    Other lines stay as they are. The file is replaced as a whole (0600) under a lock, so that neither a crash nor a
    second writer loses a line. Raises ``TunnelError`` when the file cannot be written, or is no known_hosts file.
    """
    names = tuple(name for name in (host.own_name, host.address) if name is not None)

    def edit(text: str) -> str:
        lines = _remove_names(text, names)
        if host.shared_name is not None:
            lines = _remove_names("".join(lines), (host.shared_name,), only_key=key)
        return "".join((*lines, *_make_lines(text, names, (key,))))

    _edit_file(path, edit)


def forget_node(path: Path, host: KnownHost) -> None:
    """Removes the keys on record for the host's own name, because its node was removed from mesh.yaml: a later node of
    this name is another machine. The keys of its address stay. Raises ``TunnelError`` when the file cannot be written.
    """
    name = host.own_name
    if name is not None and read_known_hosts(path).keys_for(name):
        _edit_file(path, lambda text: "".join(_remove_names(text, (name,))))


def adopt_shared_keys(path: Path, host: KnownHost) -> None:
    """Moves the keys that an earlier version has recorded for the shared name to the host's own name.

    Called when the host has shown such a key: this shows that the keys belong to this mesh, and not to another mesh of
    the user. If no key is on record for the address, the keys are recorded for the address too, because another mesh
    with the same node at the same address has also used the shared name. Does nothing if the own name has keys, or the
    shared name has none. Raises ``TunnelError`` when the file cannot be written.
    """
    own_name, shared_name = host.own_name, host.shared_name
    if own_name is None or shared_name is None:
        return

    def edit(text: str) -> str:
        """Returns the text with the shared keys under the host's own name, unless another process has done so
        already."""
        known = parse_known_hosts(text)
        keys = known.keys_for(shared_name)
        if known.keys_for(own_name) or not keys:  # another process was first
            return text
        names = (own_name,) if known.keys_for(host.address) else (own_name, host.address)
        return "".join((*_remove_names(text, (shared_name,)), *_make_lines(text, names, keys)))

    _edit_file(path, edit)


def _edit_file(path: Path, edit: Callable[[str], str]) -> None:
    """Replaces the text of the file by ``edit(text)``, as ``record_host_key`` explains. Raises ``TunnelError``."""
    path = path.expanduser()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = Path(os.path.realpath(path))  # a link stays a link, and its target is replaced
        with file_lock.locked_folder(target.parent):
            ensure_known_hosts_file(target)
            new_text = edit(_read_text(target))
            atomic_file.replace(target, new_text, errors="surrogateescape")  # the reverse of ``_read_text``
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


def _remove_names(text: str, names: tuple[str, ...], *, only_key: HostKey | None = None) -> list[str]:
    """The lines of ``text`` without ``names``. ``only_key``: a line with another key stays. Lines with a marker
    (``@revoked``) stay. Each line has its newline."""
    lines: list[str] = []
    for line in _split_lines(text):
        entry = _parse_line(line)
        matching_names: set[str] = set()
        if entry is not None and not entry.marker and only_key in (None, entry.key):
            matching_names = {name.lower() for name in names if entry.matches(name)}
        if entry is None or not matching_names:
            lines.append(line + "\n")
            continue
        # The other hosts of a line (``a,b ssh-ed25519 …``) and its patterns keep the key. A hashed line has one name
        # only, so the whole line goes.
        other_hosts = [host for host in entry.hosts.split(",") if host.lower() not in matching_names]
        if other_hosts and not entry.hashed:
            lines.append(f"{','.join(other_hosts)} {entry.key.public_key_text}\n")
    return lines


def _make_lines(text: str, names: tuple[str, ...], keys: tuple[HostKey, ...]) -> list[str]:
    """A line for each of ``names`` and ``keys``. The names are hashed if ``text``, the file so far, has hashed
    names."""
    file_has_hashes = parse_known_hosts(text).hashed
    return [
        f"{_hash_name(name) if file_has_hashes else name} {key.public_key_text}\n" for name in names for key in keys
    ]
