"""`gpumesh trust`: a person decides that a host is the one they mean."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.context import run, settings
from gpumesh.cli.lazy import new_app
from gpumesh.errors import ExitCode, GPUMeshError, UsageError
from gpumesh.topology import NodeSpec, SshSpec, Topology

if TYPE_CHECKING:
    from gpumesh.tunnels.hostkeys import HostKey, Judgement

app = new_app()


@app.command()
def trust(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=completion.nodes)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Record without asking.")] = False,
) -> None:
    """Show a host key's fingerprint, say whether it is new or has changed, and record it.

    Compare the fingerprint with the one that your provider shows, or with `ssh-keygen -lf
    /etc/ssh/ssh_host_ed25519_key.pub` on the host. It is kept for the node's name as well as for its address.
    """
    topology = settings(ctx).topology()
    specs = [_ssh_node(topology, name) for name in nodes]
    failed = False
    for spec, ssh in specs:
        try:
            confirm_key(spec, ssh, yes=yes)
        except GPUMeshError as error:
            if len(specs) == 1:
                raise
            typer.echo(f"{spec.name}: {error.message}", err=True)
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
    """Shows the host's key and records it if it is not on record, after asking unless ``yes``."""
    from gpumesh.tunnels import hostkeys
    from gpumesh.tunnels.hostkeys import Verdict

    if ssh.address_from is not None:
        ssh = run(_located(spec, ssh))
    key = _ask_host(spec, ssh)
    judgement = hostkeys.read(ssh.known_hosts).judge(key, node=spec.name, host=ssh.host, port=ssh.port)
    where = hostkeys.address_name(ssh.host, ssh.port)
    typer.echo(f"{spec.name}  {where}  {key.kind} {key.fingerprint}  {judgement.verdict}")
    if judgement.verdict is Verdict.KNOWN:
        return
    if judgement.verdict is Verdict.REVOKED:
        raise GPUMeshError(
            f"this key is marked @revoked in {ssh.known_hosts}: it is not recorded", node=spec.name, hint=None
        )
    _explain(judgement, ssh.known_hosts)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to confirm the fingerprint", hint="compare it, then add --yes")
        typer.confirm("Is this the right fingerprint? Record it?", abort=True, err=True)
    hostkeys.record(ssh.known_hosts, key, node=spec.name, host=ssh.host, port=ssh.port)
    typer.echo(f"recorded in {ssh.known_hosts}", err=True)


def _explain(judgement: Judgement, known_hosts: Path) -> None:
    for old in judgement.expected:
        typer.echo(f"  on record in {known_hosts}: {old.kind} {old.fingerprint}", err=True)
    if judgement.expected:
        typer.echo(
            "  The key has CHANGED. That is so after a pod was reset or its machine replaced. On a machine that you"
            " did not touch, somebody may be in between: ask its owner before you go on.",
            err=True,
        )


async def _located(spec: NodeSpec, ssh: SshSpec) -> SshSpec:
    from gpumesh.tunnels import address

    assert ssh.address_from is not None
    host, port = await address.ask_address(ssh.address_from, node=spec.name, default_port=ssh.port)
    return replace(ssh, host=host, port=port)


def _ask_host(spec: NodeSpec, ssh: SshSpec) -> HostKey:
    """The key that the host proves to have. Through jump hosts the system's ssh is asked, which may log in there."""
    from gpumesh.tunnels import handshake, hostkeys
    from gpumesh.tunnels.blocking import Deadline

    if ssh.proxy_jump:
        raise UsageError(
            f"{spec.name} is behind a jump host, which `trust` cannot look through",
            hint=f"log in once with `ssh -J {','.join(ssh.proxy_jump)} -p {ssh.port} {ssh.user}@{ssh.host}`:"
            " it asks, and records the key in known_hosts",
        )
    deadline = Deadline(ssh.connect_timeout_s, time.monotonic)
    kinds = hostkeys.read(ssh.known_hosts).kinds(node=spec.name, host=ssh.host, port=ssh.port)
    sock = handshake.tcp_connect(ssh.host, ssh.port, deadline)
    transport = handshake.handshake(sock, host=ssh.host, port=ssh.port, deadline=deadline, kinds=kinds)
    try:
        return handshake.host_key_of(transport)
    finally:
        transport.close()
