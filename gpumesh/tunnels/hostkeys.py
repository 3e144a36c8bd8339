"""Which host keys are trusted: known_hosts files, read and written as OpenSSH does (sshd(8), SSH_KNOWN_HOSTS).

Trust is kept by node as well as by address: a pod comes back on another port, and a port comes back with another pod.
So ``record_host_key`` writes two names, the address and ``gpumesh-node-NAME``; and a node's own entry, where there is
one, decides alone.

Deciding is pure (``KnownHosts.judge``); reading and writing are apart.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import translate
from pathlib import Path

from gpumesh import atomic_file
from gpumesh.errors import HostKeyChanged, HostKeyRevoked, HostKeyUnknown, TunnelError
from gpumesh.quoting import paste_command
from gpumesh.topology import HostKeyPolicy

SIZE_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class HostKey:
    """A host's public key. ``key_type`` is its SSH name (``ssh-ed25519``), ``blob`` its wire form."""

    key_type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` shows it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def public_key_text(self) -> str:
        """The two fields of a known_hosts line."""
        return f"{self.key_type} {base64.b64encode(self.blob).decode()}"


class HostKeyStatus(StrEnum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class HostKeyCheck:
    """``expected``: the keys on record where this one is ``CHANGED``. ``recorded_for_node``: it is on record for the
    node itself, not for its address alone. ``certificate_only``: only a certificate authority vouches for this host,
    and whoever judges cannot check certificates (paramiko)."""

    status: HostKeyStatus
    expected: tuple[HostKey, ...] = ()
    recorded_for_node: bool = False
    certificate_only: bool = False


@dataclass(frozen=True, slots=True)
class KnownHostsEntry:
    """One line. ``marker`` is ``""``, ``@revoked`` or ``@cert-authority``."""

    marker: str
    hosts: str
    key: HostKey

    def matches(self, name: str) -> bool:
        if self.hosts.startswith("|1|"):
            return _hash_matches(self.hosts, name)
        found = False
        for pattern in self.hosts.lower().split(","):
            negated = pattern.startswith("!")
            if _pattern_matches(pattern[negated:], name.lower()):
                if negated:
                    return False
                found = True
        return found


@dataclass(frozen=True, slots=True)
class KnownHosts:
    entries: tuple[KnownHostsEntry, ...] = ()

    @property
    def hashed(self) -> bool:
        """Whether names are hashed in this file (OpenSSH's ``HashKnownHosts``)."""
        return any(entry.hosts.startswith("|1|") for entry in self.entries)

    def check_key(self, key: HostKey, *, node: str, host: str, port: int) -> HostKeyCheck:
        """Whether ``key`` is the one on record for this node, or else for this address."""
        alias, address = host_key_alias(node), known_hosts_address(host, port)
        for entry in self.entries:
            revoked = entry.marker == "@revoked" and entry.key.blob == key.blob
            if revoked and (entry.matches(alias) or entry.matches(address)):
                return HostKeyCheck(HostKeyStatus.REVOKED)
        by_authority = False
        for name in (alias, address):
            matching = [entry for entry in self.entries if entry.matches(name)]
            known = tuple(entry.key for entry in matching if not entry.marker)
            if any(one.blob == key.blob for one in known):
                return HostKeyCheck(HostKeyStatus.KNOWN, recorded_for_node=name == alias)
            if known:
                return HostKeyCheck(HostKeyStatus.CHANGED, known)
            by_authority |= any(entry.marker == "@cert-authority" for entry in matching)
        return HostKeyCheck(HostKeyStatus.UNKNOWN, certificate_only=by_authority)

    def keys(self, *, node: str, host: str, port: int) -> tuple[HostKey, ...]:
        """The keys on record: the node's own, or else those of its address."""
        for name in (host_key_alias(node), known_hosts_address(host, port)):
            keys = [entry.key for entry in self.entries if not entry.marker and entry.matches(name)]
            if keys:
                return tuple(dict.fromkeys(keys))
        return ()

    def key_types(self, *, node: str, host: str, port: int) -> tuple[str, ...]:
        """The kinds of key on record: to be asked of the host first, or it would offer one that nobody knows."""
        return tuple(dict.fromkeys(key.key_type for key in self.keys(node=node, host=host, port=port)))


def format_address(host: str, port: int) -> str:
    """An address as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def known_hosts_address(host: str, port: int) -> str:
    """As known_hosts names an address: the port only if it is not 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def host_key_alias(node: str) -> str:
    """A node as a name in known_hosts; it cannot be a pattern, whatever the node is called."""
    safe = re.sub(r"[^a-z0-9._-]", lambda found: f"%{ord(found.group()):x}", node.lower())
    return f"gpumesh-node-{safe}"


def parse_known_hosts(text: str) -> KnownHosts:
    """What OpenSSH would make of a known_hosts file: lines that it cannot read are passed over."""
    return KnownHosts(tuple(entry for line in _lines(text) if (entry := _parse_line(line)) is not None))


def _lines(text: str) -> list[str]:
    """Not ``splitlines``: that splits at form feeds and the like, too."""
    return text.removesuffix("\n").split("\n") if text else []


def _parse_line(line: str) -> KnownHostsEntry | None:
    fields = line.split()
    if not fields or fields[0].startswith("#"):
        return None
    marker = ""
    if fields[0].startswith("@"):
        marker, *fields = fields
        if marker not in ("@revoked", "@cert-authority"):
            return None
    if len(fields) < 3:
        return None
    try:
        blob = base64.b64decode(fields[2], validate=True)
    except (binascii.Error, ValueError):
        return None
    return KnownHostsEntry(marker, fields[0], HostKey(fields[1], blob))


def _pattern_matches(pattern: str, name: str) -> bool:
    # ``[host]:port`` is no character class: OpenSSH knows only * and ?.
    return re.match(translate(pattern.replace("[", "[[]")), name) is not None


def _hash_matches(hosts: str, name: str) -> bool:
    try:
        _, _, salt, digest = hosts.split("|")
        expected = base64.b64decode(digest)
        computed = hmac.new(base64.b64decode(salt), name.encode(), "sha1").digest()
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(expected, computed)


def _hashed(name: str) -> str:
    salt = secrets.token_bytes(20)
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


# -- files -----------------------------------------------------------------------------------------------------------


def read_known_hosts(path: Path) -> KnownHosts:
    """A file that does not exist holds nothing. Raises ``TunnelError`` when it cannot be read."""
    return parse_known_hosts(_text(path.expanduser()))


def _text(path: Path) -> str:
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
    return raw.decode("utf-8", "surrogateescape")  # whatever it is, it is written back unchanged


def record_host_key(path: Path, key: HostKey, *, node: str, host: str, port: int) -> None:
    """Trusts ``key`` for this node and this address; other keys on record for either name are dropped. A jump host is
    no node: its ``node`` is "", and it is kept by its address alone.

    Other lines stay as they are. The new file is written beside and renamed, 0600, under a lock, so that neither a
    crash nor a second writer loses a line. Raises ``TunnelError`` when that fails.
    """
    path = path.expanduser()
    names = (*((host_key_alias(node),) if node else ()), known_hosts_address(host, port))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link stays a link: what it points to is replaced.
        target = Path(os.path.realpath(path))
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            ensure_known_hosts_file(target)
            atomic_file.replace(target, "".join(_recorded(_text(target), key, names)), errors="surrogateescape")
        finally:
            os.close(folder)
    except OSError as error:
        raise TunnelError(
            f"known_hosts file {path} cannot be written: {error.strerror}", hint="check the folder's owner and mode"
        ) from error


def ensure_known_hosts_file(path: Path) -> None:
    """Before something is written there: a stranger's mesh.yaml may name a start-up file of the shell. Raises
    ``TunnelError`` for a file that has more than comments, and no host's key."""
    lines = [line for line in _lines(_text(path.expanduser())) if line.strip() and not line.lstrip().startswith("#")]
    if lines and all(_parse_line(line) is None for line in lines):
        raise TunnelError(f"{path} is no known_hosts file: nothing is recorded in it", hint="correct `ssh.known_hosts`")


def _recorded(text: str, key: HostKey, names: tuple[str, ...]) -> Iterable[str]:
    hashed = parse_known_hosts(text).hashed
    for line in _lines(text):
        entry = _parse_line(line)
        if entry is None or entry.marker:
            yield line + "\n"
            continue
        stale = [name for name in names if entry.matches(name)]
        if not stale:
            yield line + "\n"
            continue
        # A line may name other hosts too (``a,b ssh-ed25519 …``): they keep it. A pattern stays, a hash has one name.
        others = [host for host in entry.hosts.split(",") if host.lower() not in [name.lower() for name in stale]]
        if others and not entry.hosts.startswith("|1|"):
            yield f"{','.join(others)} {entry.key.public_key_text}\n"
    for name in names:
        yield f"{_hashed(name) if hashed else name} {key.public_key_text}\n"


# -- the policy ------------------------------------------------------------------------------------------------------


def verify_host_key(key: HostKey, *, node: str, host: str, port: int, known_hosts: Path, policy: HostKeyPolicy) -> None:
    """Returns when ``key`` may be trusted; with ``accept-new`` an unknown one is recorded. Raises ``HostKeyUnknown``,
    ``HostKeyChanged`` or ``HostKeyRevoked``."""
    judgement = read_known_hosts(known_hosts).check_key(key, node=node, host=host, port=port)
    where = format_address(host, port)
    shown = f"{key.key_type} {key.fingerprint}"
    trust = paste_command("gpumesh trust {NODE}", NODE=node or "NODE")  # of a jump host: of any node behind it
    match judgement.status:
        case HostKeyStatus.KNOWN:
            return
        case HostKeyStatus.UNKNOWN if judgement.certificate_only:
            raise HostKeyUnknown(
                f"{where} is vouched for by a certificate authority in {known_hosts}, which transport sshtunnel cannot"
                f" check (it showed {shown})",
                hint=f"set `transport: openssh` for the node, or record this key alone: {trust}",
                node=node,
            )
        case HostKeyStatus.UNKNOWN if policy is HostKeyPolicy.ACCEPT_NEW:
            record_host_key(known_hosts, key, node=node, host=host, port=port)
        case HostKeyStatus.UNKNOWN:
            raise HostKeyUnknown(
                f"the host key of {where} is not in {known_hosts}: {shown}",
                hint=f"{trust} shows it and records it",
                node=node,
            )
        case HostKeyStatus.CHANGED:
            expected = ", ".join(f"{one.key_type} {one.fingerprint}" for one in judgement.expected[:3])
            raise HostKeyChanged(
                f"the host key of {where} is {shown}, but {known_hosts} has {expected}",
                hint="expected after a pod was reset; on a machine of yours it may be an attack:"
                f" {trust} records the new key knowingly",
                node=node,
            )
        case HostKeyStatus.REVOKED:
            raise HostKeyRevoked(
                f"the host key of {where}, {shown}, is marked @revoked in {known_hosts}",
                hint="whoever marked it knows why; nothing connects to it while it stands there",
                node=node,
            )


def host_key_algorithms(kinds: Sequence[str]) -> tuple[str, ...]:
    """A key's kind as the names under which a host may offer it: RSA has three hashes."""
    names: list[str] = []
    for kind in kinds:
        names += ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]
    return tuple(names)
