"""Decides whether a host's key is trusted, and makes the error for a key that is not. (known_hosts.py has the files.)

Trust belongs to a node as well as to an address: a pod comes back on another port, and a port comes back with another
pod. So a key is recorded under two names, the address and the node's name in its mesh (``KnownHost``). If there is an
entry for the node, this entry decides, and the entries for the address do not count.

Earlier versions did not tell the meshes of a user apart. An entry of theirs decides until one mesh has shown that the
entry is its own (``adopt_shared_keys``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gpumesh.errors import HostKeyChanged, HostKeyRevoked, HostKeyUnknown, TunnelError
from gpumesh.text.addresses import format_address
from gpumesh.text.quoting import paste_command
from gpumesh.topology import HostKeyPolicy, SshSpec
from gpumesh.tunnels.known_hosts import (
    CERTIFICATE_AUTHORITY,
    REVOKED,
    HostKey,
    KnownHost,
    KnownHosts,
    adopt_shared_keys,
    read_known_hosts,
    record_host_key,
)

log = logging.getLogger(__name__)


class HostKeyStatus(StrEnum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class HostKeyCheck:
    """The result of comparing a host's key with the keys on record.

    ``expected``: the keys on record, when the host's key is ``CHANGED``. ``decided_by``: the name whose keys decided;
    ``None`` if no key is on record. ``certificate_only``: only a certificate authority is on record for this host, and
    paramiko cannot check certificates.
    """

    status: HostKeyStatus
    expected: tuple[HostKey, ...] = ()
    decided_by: str | None = None
    certificate_only: bool = False


def check_host_key(known: KnownHosts, key: HostKey, host: KnownHost) -> HostKeyCheck:
    """Compares ``key`` with the keys on record for the first of the host's names that has any. Pure."""
    if _is_revoked(known, key, host.names):
        return HostKeyCheck(HostKeyStatus.REVOKED)
    name = known.deciding_name(host)
    if name is not None:
        recorded_keys = known.keys_for(name)
        if any(recorded.blob == key.blob for recorded in recorded_keys):
            return HostKeyCheck(HostKeyStatus.KNOWN, decided_by=name)
        return HostKeyCheck(HostKeyStatus.CHANGED, recorded_keys, decided_by=name)
    has_authority = any(
        entry.marker == CERTIFICATE_AUTHORITY and any(entry.matches(name) for name in host.names)
        for entry in known.entries
    )
    return HostKeyCheck(HostKeyStatus.UNKNOWN, certificate_only=has_authority)


def _is_revoked(known: KnownHosts, key: HostKey, names: Sequence[str]) -> bool:
    """Whether a line of ``known`` marks ``key`` as @revoked for one of ``names``."""
    revocations = [entry for entry in known.entries if entry.marker == REVOKED and entry.key.blob == key.blob]
    return any(entry.matches(name) for entry in revocations for name in names)


def verify_host_key(
    key: HostKey, host: KnownHost, *, known_hosts: Path, policy: HostKeyPolicy, more_known_hosts: Sequence[Path] = ()
) -> None:
    """Returns if ``key`` is trusted. With policy ``accept-new``, an unknown key is recorded and then trusted, except
    when a certificate authority is on record for the host: paramiko cannot check certificates, so a person must decide.
    ``more_known_hosts`` are files that are only read.

    Raises ``HostKeyUnknown``, ``HostKeyChanged`` or ``HostKeyRevoked`` for a key that is not trusted.
    """
    check = check_host_key(read_known_hosts(known_hosts, *more_known_hosts), key, host)
    if check.status is HostKeyStatus.KNOWN:
        adopt_keys_if_shared(known_hosts, host)
        return
    accepts_new_key = policy is HostKeyPolicy.ACCEPT_NEW and not check.certificate_only
    if check.status is HostKeyStatus.UNKNOWN and accepts_new_key:
        record_host_key(known_hosts, key, host)
        return
    raise _host_key_error(check, key, host, known_hosts=known_hosts)


def adopt_keys_if_shared(known_hosts: Path, host: KnownHost) -> None:
    """Calls ``adopt_shared_keys`` if the keys of the shared name decided about the host, which was then found trusted.
    In a file that cannot be written, the keys stay where they are, and still decide."""
    try:
        if read_known_hosts(known_hosts).deciding_name(host) == host.shared_name:
            adopt_shared_keys(known_hosts, host)
    except TunnelError as error:
        log.info("the host key of %s stays recorded as an earlier version did it: %s", host.node, error)


def _host_key_error(check: HostKeyCheck, key: HostKey, host: KnownHost, *, known_hosts: Path) -> TunnelError:
    """The error for a key that is not trusted."""
    node, address = host.node, format_address(host.host, host.port)
    shown_key = f"{key.key_type} {key.fingerprint}"
    # A jump host has no name of its own (""): the user puts any node behind it for NODE.
    trust = paste_command("gpumesh trust {NODE}", NODE=node or "NODE")
    if check.status is HostKeyStatus.REVOKED:
        return HostKeyRevoked(
            f"the host key of {address}, {shown_key}, is marked @revoked in {known_hosts}",
            hint="ask the person who marked it; gpumesh refuses this key while the mark is in the file",
            node=node,
        )
    if check.status is HostKeyStatus.CHANGED:
        shown_expected_keys = check.expected[:3]  # three are enough for a message
        expected = ", ".join(f"{recorded.key_type} {recorded.fingerprint}" for recorded in shown_expected_keys)
        # An earlier version recorded this entry, under a name that all meshes of the user share: another mesh may have
        # a node of the same name, and the entry may be for that node.
        if check.decided_by == host.shared_name:
            return HostKeyChanged(
                f"the host key of {address} is {shown_key}, but {known_hosts} has {expected} for a node {node!r}, from"
                " a version that did not tell meshes apart",
                hint=f"if that is the node of another mesh.yaml, {trust} records this key for this mesh; if it is this"
                " node, its host was reset, or it may be an attack",
                node=node,
            )
        return HostKeyChanged(
            f"the host key of {address} is {shown_key}, but {known_hosts} has {expected}",
            hint="expected after a pod was reset; on a machine of yours it may be an attack:"
            f" {trust} records the new key knowingly",
            node=node,
        )
    if check.certificate_only:
        return HostKeyUnknown(
            f"{address} is vouched for by a certificate authority in {known_hosts}, which transport sshtunnel cannot"
            f" check (it showed {shown_key})",
            hint=f"set `transport: openssh` for the node, or record this key alone: {trust}",
            node=node,
        )
    return HostKeyUnknown(
        f"the host key of {address} is not in {known_hosts}: {shown_key}",
        hint=f"{trust} shows it and records it",
        node=node,
    )


def choose_ssh_alias(host: KnownHost, ssh: SshSpec) -> str | None:
    """The name under which OpenSSH should look up and record the host's key; ``None``: its address, as ssh does it.

    The node's own or shared name if it has keys. The own name also if the first key will be recorded, and nothing is on
    record for the address: then the trust in a pod moves with the pod. Raises ``HostKeyRevoked`` for a key that is
    revoked under another of the names, because ssh looks at one name only.
    """
    known = read_known_hosts(*ssh.known_hosts_files)
    name = known.deciding_name(host)
    if name is not None and name != host.address:
        _refuse_revoked_keys(known, known.keys_for(name), host, known_hosts=ssh.known_hosts)
        return name
    # A certificate authority for the address counts as well: ssh can check the host's certificate.
    address_is_known = any(entry.matches(host.address) for entry in known.entries if entry.marker != REVOKED)
    records_first_key = ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW and not address_is_known
    return host.own_name if records_first_key else None


def _refuse_revoked_keys(
    known: KnownHosts, node_keys: Sequence[HostKey], host: KnownHost, *, known_hosts: Path
) -> None:
    """Raises ``HostKeyRevoked`` when one of ``node_keys``, the keys on record for the node, is revoked for any of the
    host's names."""
    for key in node_keys:
        if _is_revoked(known, key, host.names):
            raise HostKeyRevoked(
                f"a host key on record for {host.node}, {key.key_type} {key.fingerprint}, is marked @revoked"
                f" in {known_hosts}",
                hint="ask the person who marked it; then remove the node's own line, or the mark",
            )


def host_key_algorithms(key_types: Sequence[str]) -> tuple[str, ...]:
    """The algorithm names under which a host may offer keys of these types. An RSA key has one name for each hash."""
    names: list[str] = []
    for key_type in key_types:
        if key_type == "ssh-rsa":
            names += ["rsa-sha2-512", "rsa-sha2-256"]
        else:
            names.append(key_type)
    return tuple(names)
