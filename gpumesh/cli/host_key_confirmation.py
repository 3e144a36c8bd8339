"""Shows the host key of a node, asks a person whether it is the right key, and records it: for `trust` and `init`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gpumesh.cli.open_session import run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError, UsageError
from gpumesh.topology import NodeSpec, SshSpec

if TYPE_CHECKING:
    from gpumesh.tunnels.hostkeys import HostKeyCheck, HostKeyStatus
    from gpumesh.tunnels.known_hosts import HostKey, KnownHost


class NotConfirmed(GPUMeshError):
    """A person was asked whether the key is right, and answered no."""


def confirm_key(spec: NodeSpec, ssh: SshSpec, *, mesh: str, yes: bool) -> None:
    """Shows the host's key, asks a person unless ``yes`` is set, and records the key if it is not on record. Does the
    same for jump hosts first, because we log in to them on the way. ``mesh`` is the ``Topology.identity`` of the node's
    mesh. Raises NotConfirmed if the person answers no."""
    from gpumesh.tunnels.jump_hosts import list_hops
    from gpumesh.tunnels.known_hosts import KnownHost

    if ssh.address_from is not None:
        ssh = run_async(_look_up_address(spec, ssh))
    *jumps, host = list_hops(ssh)
    for jump in jumps:
        known_jump = KnownHost(jump.host, jump.port)
        _confirm_host(known_jump, f"{spec.name} (jump host)", jump, _fetch_key(known_jump, jump), yes=yes)
    known_host = KnownHost(host.host, host.port, spec.name, mesh)
    _confirm_host(known_host, spec.name, host, _fetch_key(known_host, host), yes=yes)


def _confirm_host(host: KnownHost, shown_name: str, ssh: SshSpec, key: HostKey, *, yes: bool) -> None:
    """Shows the key of one host, lets a person confirm it unless ``yes`` is set, and records it. Records it without a
    question if it is on record for the address, but not for the node. Raises GPUMeshError for a revoked key.

    ``host.node`` is "" for a jump host: if its key is on record, nothing is shown. ``shown_name``: the host in
    messages."""
    from gpumesh.tunnels import hostkeys, known_hosts
    from gpumesh.tunnels.hostkeys import HostKeyStatus

    recorded_keys = known_hosts.read_known_hosts(*ssh.known_hosts_files)
    judgement = hostkeys.check_host_key(recorded_keys, key, host)
    address, node = host.address, host.node
    is_on_record = judgement.status is HostKeyStatus.KNOWN
    is_jump_host = not node
    if is_on_record and is_jump_host:
        return
    _print_key(shown_name, address, key, judgement.status)
    if judgement.status is HostKeyStatus.REVOKED:
        raise GPUMeshError(
            f"the key of {address} is marked @revoked in {ssh.known_hosts}: it is not recorded",
            hint="ask the person who marked it, and do not connect to a host that shows it",
            node=node or None,
        )
    if is_on_record and judgement.decided_by == host.own_name:
        return
    if not is_on_record:
        for line in explain_judgement(judgement, ssh.known_hosts, host):
            typer.echo(f"  {clean_line(line)}", err=True)
        if not yes:
            _ask_person(shown_name, address)
    known_hosts.record_host_key(ssh.known_hosts, key, host)
    owners = f"{address} and for {node}, wherever it moves" if node else address
    message = clean_line(f"recorded in {ssh.known_hosts} for {owners}")
    typer.echo(f"  {message}", err=True)


def _print_key(shown_name: str, address: str, key: HostKey, status: HostKeyStatus) -> None:
    """Prints one line: the node, the address, the type and fingerprint of the key, and whether the key is known."""
    from gpumesh.tunnels.hostkeys import HostKeyStatus

    status_text = {HostKeyStatus.UNKNOWN: "new", HostKeyStatus.CHANGED: "CHANGED"}.get(status, status.value)
    parts = (shown_name, address, f"{key.key_type} {key.fingerprint}", status_text)
    typer.echo("  ".join(map(clean_line, parts)))


def _ask_person(shown_name: str, address: str) -> None:
    """Returns when a person confirms the key. Raises NotConfirmed, or UsageError when there is no terminal."""
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm the fingerprint", hint="compare it, then add --yes")
    if not typer.confirm("Is this the right fingerprint? Record it?", err=True):
        raise NotConfirmed(
            f"{shown_name}: the key of {address} is not recorded, since you said that it is not the right one",
            hint="ask the host's owner or your provider which key it has",
        )


def explain_judgement(judgement: HostKeyCheck, known_hosts: Path, host: KnownHost) -> list[str]:
    """The sentences that say what the judgement means and what to do. Pure."""
    if judgement.expected:
        record_lines = [f"on record in {known_hosts}: {old.key_type} {old.fingerprint}" for old in judgement.expected]
        if judgement.decided_by == host.shared_name:
            return [
                *record_lines,
                f"An earlier version has recorded that key for a node {host.node!r} of any mesh. If it is the node of"
                " another mesh.yaml, this host is another machine, whose key is recorded for this mesh alone. If it is"
                " this node, its host was reset or replaced, or somebody is in between.",
            ]
        return [
            *record_lines,
            "The host shows another key than the one on record. That is so after a pod was reset or its machine"
            " replaced. On a machine that nobody touched, somebody may be in between: ask its owner before you go on.",
        ]
    if judgement.certificate_only:
        return [
            f"A certificate authority in {known_hosts} vouches for this host. `transport: openssh` checks its"
            " certificate, and then nothing has to be recorded. Recorded, this one key is trusted by itself."
        ]
    return [
        "Nothing is on record yet for this host. Compare the fingerprint with the one that your provider shows, or"
        " with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the host itself."
    ]


async def _look_up_address(spec: NodeSpec, ssh: SshSpec) -> SshSpec:
    """``ssh`` with the host and port that the node's command ``address_from`` prints. Raises GPUMeshError if the
    command fails, or prints no address."""
    from gpumesh.tunnels import address_command

    assert ssh.address_from is not None, "the node has no address_from"
    host, port = await address_command.ask_address(ssh.address_from, node=spec.name, default_port=ssh.port)
    return replace(ssh, host=host, port=port)


def _fetch_key(host: KnownHost, ssh: SshSpec) -> HostKey:
    """The public key that the host shows; the host proves that it has the private part. Raises GPUMeshError if the host
    cannot be reached."""
    from gpumesh import config
    from gpumesh.tunnels import transports

    secrets: list[tuple[str, str]] = []  # pairs of name and value
    if ssh.proxy_jump:  # on the way to the host we log in to its jump hosts, which needs the secrets
        for name, variable in (("password", ssh.password_env), ("passphrase", ssh.passphrase_env)):
            if variable is not None:
                secrets.append((name, config.read_secret(variable, node=host.node or None)))
    else:  # a host shows its key before a login, so a secret that is not set must not be an error
        ssh = replace(ssh, password_env=None, passphrase_env=None)
    return run_async(
        transports.fetch_host_key(
            host.node, ssh, mesh=host.mesh, secrets=tuple(secrets), timeout_s=ssh.connect_timeout_s
        )
    )
