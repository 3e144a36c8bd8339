"""`gpumesh trust`: shows the host key of a node, and records the key when a person confirms it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, find_node, global_options
from gpumesh.cli.host_key_confirmation import NotConfirmed, confirm_key
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, GPUMeshError, UsageError
from gpumesh.topology import NodeSpec, SshSpec, Topology

app = new_app()


@app.command()
def trust(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=completion.complete_nodes)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Record without asking.")] = False,
) -> None:
    """Show a host key's fingerprint, say whether it is new or has changed, and record it.

    Compare the fingerprint with the one that your provider shows, or with `ssh-keygen -lf
    /etc/ssh/ssh_host_ed25519_key.pub` on the host. It is kept for the node's name as well as for its address, so that
    a node that moves is known again. Behind jump hosts, their keys come first. A running mesh then connects at once.
    """
    options = global_options(ctx)
    topology = options.topology()
    specs = [_find_ssh_node(topology, name) for name in nodes]
    failed = False
    trusted_nodes = []
    for spec, ssh in specs:
        try:
            confirm_key(spec, ssh, mesh=topology.identity, yes=yes)
            trusted_nodes.append(spec.name)
        except GPUMeshError as error:
            if len(specs) == 1:
                raise
            # The message of NotConfirmed names the node itself.
            message = error.message if isinstance(error, NotConfirmed) else f"{spec.name}: {error.message}"
            typer.echo(clean_line(message), err=True)
            failed = True
    run_async(_reconnect_nodes(options, trusted_nodes))
    if failed:
        raise typer.Exit(int(ExitCode.FAILED))


def _find_ssh_node(topology: Topology, name: str) -> tuple[NodeSpec, SshSpec]:
    """The node and its SSH settings. Raises UsageError if there is no such node, or if it is reached without SSH."""
    spec = find_node(topology, name)
    if spec.ssh is None:
        raise UsageError(f"{name} is reached without SSH: it has no host key")
    return spec, spec.ssh


async def _reconnect_nodes(options: GlobalOptions, nodes: Sequence[str]) -> None:
    """Lets the running mesh connect to these nodes at once, if a mesh runs: it waits a minute between two attempts when
    only a person can help. Leaves out nodes that the running mesh does not have."""
    # The keys are recorded. A mesh that ends or does not answer now is no failure of this command.
    with suppress(GPUMeshError):
        async with open_session(options, embed=False) as session:
            running_nodes = {node.name for node in (await session.status()).nodes}
            for name in running_nodes.intersection(nodes):
                await session.reconnect(name)
