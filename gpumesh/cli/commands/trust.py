"""`gpumesh trust`: a person decides that a host is the one they mean."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.context import global_options, run_async
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import clean_line
from gpumesh.errors import ExitCode, GPUMeshError, UsageError
from gpumesh.topology import NodeSpec, SshSpec, Topology

if TYPE_CHECKING:
    from gpumesh.tunnels.hostkeys import HostKey, HostKeyCheck

app = new_app()


class NotConfirmed(GPUMeshError):
    """A person was asked, and said no."""


@app.command()
def trust(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=completion.complete_nodes)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Record without asking.")] = False,
) -> None:
    """Show a host key's fingerprint, say whether it is new or has changed, and record it.

    Compare the fingerprint with the one that your provider shows, or with `ssh-keygen -lf
    /etc/ssh/ssh_host_ed25519_key.pub` on the host. It is kept for the node's name as well as for its address, so that
    a node that moves is known again. Behind jump hosts, their keys come first.
    """
    topology = global_options(ctx).topology()
    specs = [_ssh_node(topology, name) for name in nodes]
    failed = False
    for spec, ssh in specs:
        try:
            confirm_key(spec, ssh, yes=yes)
        except GPUMeshError as error:
            if len(specs) == 1:
                raise
            said = error.message if isinstance(error, NotConfirmed) else f"{spec.name}: {error.message}"
            typer.echo(clean_line(said), err=True)
            failed = True
    if failed:
        raise typer.Exit(int(ExitCode.FAILED))


def _ssh_node(topology: Topology, name: str) -> tuple[NodeSpec, SshSpec]:
    try:
        spec = topology.node(name)
    except KeyError:
        known = ", ".join(node.name for node in topology.nodes)
        raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {known}") from None
    if spec.ssh is None:
        raise UsageError(f"{name} is reached without SSH: it has no host key")
    return spec, spec.ssh


def confirm_key(spec: NodeSpec, ssh: SshSpec, *, yes: bool) -> None:
    """Shows the host's key and records it if it is not on record, after asking unless ``yes``; of jump hosts on the
    way, which have to be logged in to, first. Raises NotConfirmed."""
    from gpumesh.tunnels.inprocess import handshake

    if ssh.address_from is not None:
        ssh = run_async(_located(spec, ssh))
    *jumps, host = handshake.list_hops(ssh)
    for jump in jumps:
        _confirm("", f"{spec.name} (jump host)", jump, _fetched("", jump), yes=yes, quiet=True)
    _confirm(spec.name, spec.name, host, _fetched(spec.name, host), yes=yes)


def _confirm(node: str, shown: str, ssh: SshSpec, key: HostKey, *, yes: bool, quiet: bool = False) -> None:
    """``node`` is "" for a jump host. ``quiet``: what is known is not talked of."""
    from gpumesh.tunnels import hostkeys
    from gpumesh.tunnels.hostkeys import HostKeyStatus

    judgement = hostkeys.read_known_hosts(ssh.known_hosts).check_key(key, node=node, host=ssh.host, port=ssh.port)
    where = hostkeys.known_hosts_address(ssh.host, ssh.port)
    known = judgement.status is HostKeyStatus.KNOWN
    if not (known and quiet):
        word = {HostKeyStatus.UNKNOWN: "new", HostKeyStatus.CHANGED: "CHANGED"}.get(
            judgement.status, judgement.status.value
        )
        said = (clean_line(part) for part in (shown, where, f"{key.key_type} {key.fingerprint}", word))
        typer.echo("  ".join(said))
    if judgement.status is HostKeyStatus.REVOKED:
        raise GPUMeshError(
            f"the key of {where} is marked @revoked in {ssh.known_hosts}: it is not recorded",
            hint="whoever marked it knows why: do not connect to a host that shows it",
            node=node or None,
        )
    if not known:
        for line in explain_judgement(judgement, ssh.known_hosts):
            typer.echo(f"  {clean_line(line)}", err=True)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("nobody is there to confirm the fingerprint", hint="compare it, then add --yes")
            if not typer.confirm("Is this the right fingerprint? Record it?", err=True):
                raise NotConfirmed(
                    f"{shown}: the key of {where} is not recorded, since you said that it is not the right one",
                    hint="ask the host's owner or your provider which key it has",
                )
    elif quiet or judgement.recorded_for_node:
        return
    hostkeys.record_host_key(ssh.known_hosts, key, node=node, host=ssh.host, port=ssh.port)
    names = where if not node else f"{where} and for {node}, wherever it moves"
    typer.echo(f"  {clean_line(f'recorded in {ssh.known_hosts} for {names}')}", err=True)


def explain_judgement(judgement: HostKeyCheck, known_hosts: Path) -> list[str]:
    """What the verdict means and what to do, in sentences. Pure."""
    if judgement.expected:
        on_record = [f"on record in {known_hosts}: {old.key_type} {old.fingerprint}" for old in judgement.expected]
        return [
            *on_record,
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


async def _located(spec: NodeSpec, ssh: SshSpec) -> SshSpec:
    from gpumesh.tunnels import address_command

    assert ssh.address_from is not None
    host, port = await address_command.ask_address(ssh.address_from, node=spec.name, default_port=ssh.port)
    return replace(ssh, host=host, port=port)


def _fetched(node: str, ssh: SshSpec) -> HostKey:
    """The key that the host proves to have."""
    from gpumesh import config
    from gpumesh.tunnels import transports

    secrets: tuple[tuple[str, str], ...] = ()
    if ssh.proxy_jump:  # which are logged in to
        secrets = tuple(
            (name, config.read_secret(variable, node=node or None))
            for name, variable in (("password", ssh.password_env), ("passphrase", ssh.passphrase_env))
            if variable is not None
        )
    else:
        ssh = replace(ssh, password_env=None, passphrase_env=None)
    return run_async(transports.fetch_host_key(node, ssh, secrets=secrets, timeout_s=ssh.connect_timeout_s))
