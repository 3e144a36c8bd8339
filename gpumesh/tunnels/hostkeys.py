"""Which host keys are trusted: known_hosts files, read and written as OpenSSH does (sshd(8), SSH_KNOWN_HOSTS).

Trust is kept by node as well as by address: a pod comes back on another port, and a port comes back with another pod.
So ``record`` writes two names, the address and ``gpumesh-node-NAME``; and a node's own entry, where there is one,
decides alone.

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
from gpumesh.quoting import command
from gpumesh.topology import HostKeyPolicy

SIZE_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class HostKey:
    """A host's public key. ``kind`` is its SSH name (``ssh-ed25519``), ``blob`` its wire form."""

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` shows it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def line(self) -> str:
        """The two fields of a known_hosts line."""
        return f"{self.kind} {base64.b64encode(self.blob).decode()}"


class Verdict(StrEnum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Judgement:
    """``expected``: the keys on record where this one is ``CHANGED``. ``own``: it is on record for the node itself, not
    for its address alone. ``by_authority``: only a certificate authority vouches for this host, and whoever judges
    cannot check certificates (paramiko)."""

    verdict: Verdict
    expected: tuple[HostKey, ...] = ()
    own: bool = False
    by_authority: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
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
    entries: tuple[Entry, ...] = ()

    @property
    def hashed(self) -> bool:
        """Whether names are hashed in this file (OpenSSH's ``HashKnownHosts``)."""
        return any(entry.hosts.startswith("|1|") for entry in self.entries)

    def judge(self, key: HostKey, *, node: str, host: str, port: int) -> Judgement:
        """Whether ``key`` is the one on record for this node, or else for this address."""
        alias, address = node_name(node), address_name(host, port)
        for entry in self.entries:
            revoked = entry.marker == "@revoked" and entry.key.blob == key.blob
            if revoked and (entry.matches(alias) or entry.matches(address)):
                return Judgement(Verdict.REVOKED)
        by_authority = False
        for name in (alias, address):
            matching = [entry for entry in self.entries if entry.matches(name)]
            known = tuple(entry.key for entry in matching if not entry.marker)
            if any(one.blob == key.blob for one in known):
                return Judgement(Verdict.KNOWN, own=name == alias)
            if known:
                return Judgement(Verdict.CHANGED, known)
            by_authority |= any(entry.marker == "@cert-authority" for entry in matching)
        return Judgement(Verdict.UNKNOWN, by_authority=by_authority)

    def keys(self, *, node: str, host: str, port: int) -> tuple[HostKey, ...]:
        """The keys on record: the node's own, or else those of its address."""
        for name in (node_name(node), address_name(host, port)):
            keys = [entry.key for entry in self.entries if not entry.marker and entry.matches(name)]
            if keys:
                return tuple(dict.fromkeys(keys))
        return ()

    def kinds(self, *, node: str, host: str, port: int) -> tuple[str, ...]:
        """The kinds of key on record: to be asked of the host first, or it would offer one that nobody knows."""
        return tuple(dict.fromkeys(key.kind for key in self.keys(node=node, host=host, port=port)))


def place(host: str, port: int) -> str:
    """An address as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_name(host: str, port: int) -> str:
    """As known_hosts names an address: the port only if it is not 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def node_name(node: str) -> str:
    """A node as a name in known_hosts; it cannot be a pattern, whatever the node is called."""
    safe = re.sub(r"[^a-z0-9._-]", lambda found: f"%{ord(found.group()):x}", node.lower())
    return f"gpumesh-node-{safe}"


def parse(text: str) -> KnownHosts:
    """What OpenSSH would make of a known_hosts file: lines that it cannot read are passed over."""
    return KnownHosts(tuple(entry for line in _lines(text) if (entry := _parse_line(line)) is not None))


def _lines(text: str) -> list[str]:
    """Not ``splitlines``: that splits at form feeds and the like, too."""
    return text.removesuffix("\n").split("\n") if text else []


def _parse_line(line: str) -> Entry | None:
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
    return Entry(marker, fields[0], HostKey(fields[1], blob))


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


def read(path: Path) -> KnownHosts:
    """A file that does not exist holds nothing. Raises ``TunnelError`` when it cannot be read."""
    return parse(_text(path.expanduser()))


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


def record(path: Path, key: HostKey, *, node: str, host: str, port: int) -> None:
    """Trusts ``key`` for this node and this address; other keys on record for either name are dropped. A jump host is
    no node: its ``node`` is "", and it is kept by its address alone.

    Other lines stay as they are. The new file is written beside and renamed, 0600, under a lock, so that neither a
    crash nor a second writer loses a line. Raises ``TunnelError`` when that fails.
    """
    path = path.expanduser()
    names = (*((node_name(node),) if node else ()), address_name(host, port))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link stays a link: what it points to is replaced.
        target = Path(os.path.realpath(path))
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            refuse_other_files(target)
            atomic_file.replace(target, "".join(_recorded(_text(target), key, names)), errors="surrogateescape")
        finally:
            os.close(folder)
    except OSError as error:
        raise TunnelError(
            f"known_hosts file {path} cannot be written: {error.strerror}", hint="check the folder's owner and mode"
        ) from error


def refuse_other_files(path: Path) -> None:
    """Before something is written there: a stranger's mesh.yaml may name a start-up file of the shell. Raises
    ``TunnelError`` for a file that has more than comments, and no host's key."""
    lines = [line for line in _lines(_text(path.expanduser())) if line.strip() and not line.lstrip().startswith("#")]
    if lines and all(_parse_line(line) is None for line in lines):
        raise TunnelError(f"{path} is no known_hosts file: nothing is recorded in it", hint="correct `ssh.known_hosts`")


def _recorded(text: str, key: HostKey, names: tuple[str, ...]) -> Iterable[str]:
    hashed = parse(text).hashed
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
            yield f"{','.join(others)} {entry.key.line}\n"
    for name in names:
        yield f"{_hashed(name) if hashed else name} {key.line}\n"


# -- the policy ------------------------------------------------------------------------------------------------------


def admit(key: HostKey, *, node: str, host: str, port: int, known_hosts: Path, policy: HostKeyPolicy) -> None:
    """Returns when ``key`` may be trusted; with ``accept-new`` an unknown one is recorded. Raises ``HostKeyUnknown``,
    ``HostKeyChanged`` or ``HostKeyRevoked``."""
    judgement = read(known_hosts).judge(key, node=node, host=host, port=port)
    where = place(host, port)
    shown = f"{key.kind} {key.fingerprint}"
    trust = command("gpumesh trust {NODE}", NODE=node or "NODE")  # of a jump host: of any node behind it
    match judgement.verdict:
        case Verdict.KNOWN:
            return
        case Verdict.UNKNOWN if judgement.by_authority:
            raise HostKeyUnknown(
                f"{where} is vouched for by a certificate authority in {known_hosts}, which transport sshtunnel cannot"
                f" check (it showed {shown})",
                hint=f"set `transport: openssh` for the node, or record this key alone: {trust}",
                node=node,
            )
        case Verdict.UNKNOWN if policy is HostKeyPolicy.ACCEPT_NEW:
            record(known_hosts, key, node=node, host=host, port=port)
        case Verdict.UNKNOWN:
            raise HostKeyUnknown(
                f"the host key of {where} is not in {known_hosts}: {shown}",
                hint=f"{trust} shows it and records it",
                node=node,
            )
        case Verdict.CHANGED:
            expected = ", ".join(f"{one.kind} {one.fingerprint}" for one in judgement.expected[:3])
            raise HostKeyChanged(
                f"the host key of {where} is {shown}, but {known_hosts} has {expected}",
                hint="expected after a pod was reset; on a machine of yours it may be an attack:"
                f" {trust} records the new key knowingly",
                node=node,
            )
        case Verdict.REVOKED:
            raise HostKeyRevoked(
                f"the host key of {where}, {shown}, is marked @revoked in {known_hosts}",
                hint="whoever marked it knows why; nothing connects to it while it stands there",
                node=node,
            )


def offered_as(kinds: Sequence[str]) -> tuple[str, ...]:
    """A key's kind as the names under which a host may offer it: RSA has three hashes."""
    names: list[str] = []
    for kind in kinds:
        names += ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]
    return tuple(names)
