"""`gpumesh ssh NODE`: becomes the system's ssh, with the address, the jump hosts and the keys of the node."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import find_node, global_options
from gpumesh.cli.open_session import run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError, UsageError
from gpumesh.text.quoting import paste_command, shell_words
from gpumesh.topology import HostKeyPolicy, NodeSpec, SshSpec, Topology

if TYPE_CHECKING:
    from gpumesh.tunnels.known_hosts import KnownHost

MAX_PRINTED_LENGTH = 1 << 16  # characters of a command line

app = new_app()


@app.command("ssh")
def ssh_(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(metavar="NODE", autocompletion=completion.complete_nodes)],
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- CMD...]", show_default=False)] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option("--forward", "-L", metavar="PORT:HOST:PORT", help="Forward a local port, as in ssh; repeatable."),
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the command line of ssh, and run nothing.")
    ] = False,
) -> None:
    """Log in to a node's host with the system's ssh, as mesh.yaml says.

    The address is the one that the node has now (`address_from` is asked), with its jump hosts, user, keys and
    known_hosts. All else is as your ~/.ssh/config has it. No mesh has to run. The exit code is ssh's: that of the shell
    or of CMD, or 255. The host's shell reads CMD, as with ssh; on a terminal CMD gets one too.

    \b
    Examples:
      gpumesh ssh iceland
      gpumesh ssh iceland -- nvtop
      gpumesh ssh iceland -- 'du -sh ~/.ollama/models | sort'
      gpumesh ssh iceland -L 8888:localhost:8888
    """
    from gpumesh.tunnels.known_hosts import KnownHost

    options = global_options(ctx)
    topology = options.topology()
    spec, ssh = _find_ssh_node(find_node(topology, _without_user(topology, node)))
    ssh = run_async(_look_up_address(spec, ssh))
    host = KnownHost(ssh.host, ssh.port, spec.name, topology.identity)
    arguments = run_async(_make_arguments(host, ssh, command or (), forward or (), verbose=options.verbose))
    if only_print:
        typer.echo(clean_line(shell_words(arguments), MAX_PRINTED_LENGTH))
        return
    if not options.quiet:
        for remark in _remarks(host, ssh):
            typer.echo(clean_line(remark), err=True)
    _become(arguments)


def _without_user(topology: Topology, name: str) -> str:
    """The name of the node. Raises UsageError for ``user@host`` as ssh knows it."""
    user, at_sign, host = name.rpartition("@")
    if not at_sign:
        return name
    if any(spec.name == host for spec in topology.nodes):
        here = paste_command("gpumesh ssh {NODE}", NODE=host)
        raise UsageError(f"the user of {host} is in mesh.yaml, so {user!r} has no place here", hint=here)
    raise UsageError(
        f"{name!r} is no node of the mesh", hint="`gpumesh node add 'ssh USER@HOST -p PORT'` makes a host one"
    )


def _find_ssh_node(spec: NodeSpec) -> tuple[NodeSpec, SshSpec]:
    """The node and its SSH settings. Raises UsageError if the node is reached without SSH."""
    if spec.ssh is None:
        raise UsageError(
            f"{spec.name} is reached without SSH: mesh.yaml has only its server, {spec.backend.targets[0].url}",
            hint=f"if its host has an sshd, give {spec.name} an `ssh:` section in mesh.yaml",
        )
    return spec, spec.ssh


async def _look_up_address(spec: NodeSpec, ssh: SshSpec) -> SshSpec:
    """``ssh`` with the address that the node has now. Raises HostUnresolved if `address_from` gives none.

    Unlike a tunnel, a shell may go through a provider's proxy for terminals."""
    from gpumesh.tunnels.address_command import ask_address

    if ssh.address_from is None:
        return ssh
    host, port = await ask_address(ssh.address_from, default_port=ssh.port, node=spec.name)
    return replace(ssh, host=host, port=port)


async def _make_arguments(
    host: KnownHost, ssh: SshSpec, command: Sequence[str], forwards: Sequence[str], *, verbose: bool
) -> list[str]:
    """The command line of ssh. Raises the errors of ``terminal_command``."""
    from gpumesh.tunnels.openssh.fixed_options import read_unknown_options
    from gpumesh.tunnels.openssh.terminal import terminal_command

    return terminal_command(
        host,
        ssh,
        command,
        forwards=forwards,
        with_terminal=sys.stdin.isatty() and sys.stdout.isatty(),
        verbose=verbose,
        unknown=await read_unknown_options() if ssh.alias is not None else (),
    )


def _remarks(host: KnownHost, ssh: SshSpec) -> Iterator[str]:
    """Yields what ssh is about to ask for or to refuse, and what answers it. A secret itself is never shown."""
    from gpumesh.tunnels.known_hosts import read_known_hosts

    if ssh.password_env is not None:
        yield f"ssh may ask for the password of {ssh.user}: it is in ${ssh.password_env}"
    if ssh.passphrase_env is not None:
        yield f"ssh may ask for the passphrase of the key: it is in ${ssh.passphrase_env}"
    known = read_known_hosts(*ssh.known_hosts_files)
    if ssh.host_key_policy is HostKeyPolicy.STRICT and not any(
        entry.matches(name) for entry in known.entries for name in host.names
    ):
        trust = paste_command("gpumesh trust {NODE}", NODE=host.node)
        yield f"no host key of {host.node} is on record in {ssh.known_hosts}: {trust} records it"


def _become(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by ssh, without our secrets in its environment. Raises GPUMeshError if there is no ssh."""
    from gpumesh.config import environment

    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores this signal, and a program would inherit that: the pipelines of a ProxyCommand would not end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(arguments[0], list(arguments), environment.child_environment())  # noqa: S606 - without a shell on purpose
    except FileNotFoundError:
        raise GPUMeshError(
            "the system has no ssh", hint="install OpenSSH's client, for example the package openssh-client"
        ) from None
