"""Decides whether a host's key is trusted, and makes the error for a key that is not. (known_hosts.py has the files.)

Trust belongs to a node as well as to an address: a pod comes back on another port, and a port comes back with another
pod. So a key is recorded under two names, the address and ``gpumesh-node-NAME``. If there is an entry for the node,
this entry decides, and the entries for the address do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gpumesh.addresses import format_address
from gpumesh.errors import HostKeyChanged, HostKeyRevoked, HostKeyUnknown, TunnelError
from gpumesh.quoting import paste_command
from gpumesh.topology import HostKeyPolicy, SshSpec
from gpumesh.tunnels.known_hosts import (
    CERTIFICATE_AUTHORITY,
    REVOKED,
    HostKey,
    KnownHosts,
    host_key_alias,
    known_hosts_address,
    read_known_hosts,
    record_host_key,
)


class HostKeyStatus(StrEnum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class HostKeyCheck:
    """The result of comparing a host's key with the keys on record.

    ``expected``: the keys on record, when the host's key is ``CHANGED``. ``recorded_for_node``: the host's key is on
    record for the node, not only for its address. ``certificate_only``: only a certificate authority is on record for
    this host, and paramiko cannot check certificates.
    """

    status: HostKeyStatus
    expected: tuple[HostKey, ...] = ()
    recorded_for_node: bool = False
    certificate_only: bool = False


def check_host_key(known: KnownHosts, key: HostKey, *, node: str, host: str, port: int) -> HostKeyCheck:
    """Compares ``key`` with the keys on record for the node; if there are none, with the keys for its address. Pure."""
    alias, address = host_key_alias(node), known_hosts_address(host, port)
    if _is_revoked(known, key, (alias, address)):
        return HostKeyCheck(HostKeyStatus.REVOKED)
    for name in (alias, address):  # the first name with keys on record decides
        recorded_keys = known.keys_for(name)
        if any(recorded.blob == key.blob for recorded in recorded_keys):
            return HostKeyCheck(HostKeyStatus.KNOWN, recorded_for_node=(name == alias))
        if recorded_keys:
            return HostKeyCheck(HostKeyStatus.CHANGED, recorded_keys)
    has_authority = any(
        entry.marker == CERTIFICATE_AUTHORITY and (entry.matches(alias) or entry.matches(address))
        for entry in known.entries
    )
    return HostKeyCheck(HostKeyStatus.UNKNOWN, certificate_only=has_authority)


def _is_revoked(known: KnownHosts, key: HostKey, names: Sequence[str]) -> bool:
    """Whether a line of ``known`` marks ``key`` as @revoked for one of ``names``."""
    revocations = [entry for entry in known.entries if entry.marker == REVOKED and entry.key.blob == key.blob]
    return any(entry.matches(name) for entry in revocations for name in names)


def verify_host_key(key: HostKey, *, node: str, host: str, port: int, known_hosts: Path, policy: HostKeyPolicy) -> None:
    """Returns if ``key`` is trusted. With policy ``accept-new``, an unknown key is recorded and then trusted, except
    when a certificate authority is on record for the host: paramiko cannot check certificates, so a person must decide.

    Raises ``HostKeyUnknown``, ``HostKeyChanged`` or ``HostKeyRevoked`` for a key that is not trusted.
    """
    check = check_host_key(read_known_hosts(known_hosts), key, node=node, host=host, port=port)
    if check.status is HostKeyStatus.KNOWN:
        return
    accepts_new_key = policy is HostKeyPolicy.ACCEPT_NEW and not check.certificate_only
    if check.status is HostKeyStatus.UNKNOWN and accepts_new_key:
        record_host_key(known_hosts, key, node=node, host=host, port=port)
        return
    raise _host_key_error(check, key, node=node, address=format_address(host, port), known_hosts=known_hosts)


def _host_key_error(check: HostKeyCheck, key: HostKey, *, node: str, address: str, known_hosts: Path) -> TunnelError:
    """The error for a key that is not trusted."""
    shown_key = f"{key.key_type} {key.fingerprint}"
    # A jump host has no name of its own (""): the user puts any node behind it for NODE.
    trust = paste_command("gpumesh trust {NODE}", NODE=node or "NODE")
    if check.status is HostKeyStatus.REVOKED:
        return HostKeyRevoked(
            f"the host key of {address}, {shown_key}, is marked @revoked in {known_hosts}",
            hint="whoever marked it knows why; nothing connects to it while it stands there",
            node=node,
        )
    if check.status is HostKeyStatus.CHANGED:
        shown_expected_keys = check.expected[:3]  # three are enough for a message
        expected = ", ".join(f"{recorded.key_type} {recorded.fingerprint}" for recorded in shown_expected_keys)
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


def uses_node_alias(node: str, ssh: SshSpec) -> bool:
    """Whether OpenSSH should look up and record the host's key under the node's name instead of its address.

    True in two cases: the node has a key of its own; or the first key will be recorded, and nothing is on record for
    the address. So the trust in a pod moves with the pod. Raises ``HostKeyRevoked`` for a key that is revoked under
    either name, because ssh looks at one name only.
    """
    known = read_known_hosts(ssh.known_hosts)
    node_keys = known.keys_for(host_key_alias(node))
    _refuse_revoked_keys(known, node_keys, node=node, ssh=ssh)
    if node_keys:
        return True
    address = known_hosts_address(ssh.host, ssh.port)
    # A certificate authority for the address counts as well: ssh can check the host's certificate.
    address_is_known = any(entry.matches(address) for entry in known.entries if entry.marker != REVOKED)
    return ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW and not address_is_known


def _refuse_revoked_keys(known: KnownHosts, node_keys: Sequence[HostKey], *, node: str, ssh: SshSpec) -> None:
    """Raises ``HostKeyRevoked`` when one of ``node_keys``, the keys on record for the node, is revoked for the node or
    for its address."""
    for key in node_keys:
        check = check_host_key(known, key, node=node, host=ssh.host, port=ssh.port)
        if check.status is HostKeyStatus.REVOKED:
            raise HostKeyRevoked(
                f"a host key on record for {node}, {key.key_type} {key.fingerprint}, is marked @revoked"
                f" in {ssh.known_hosts}",
                hint="whoever marked it knows why; remove the node's own line, or the mark",
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
