"""`gpumesh init`: writes a mesh.yaml from ssh command lines, after a probe of their hosts.

Further parts of the command are in `cli/init/`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.init.host_input import ask_for_hosts, mark_aliases, read_hosts
from gpumesh.cli.init.new_file import write_new_file
from gpumesh.cli.init.node_drafts import make_drafts, make_host_drafts
from gpumesh.cli.init.output_file import check_output
from gpumesh.cli.init.probe_drafts import new_file_topology
from gpumesh.cli.init.ssh_command_line import SshLine
from gpumesh.cli.views.safe_text import clean_line

app = new_app()


@app.command()
def init(
    ctx: typer.Context,
    from_: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="'ssh …'", help="An ssh command line, NAME='ssh …', or - for stdin; repeatable."
        ),
    ] = None,
    from_ssh_config: Annotated[
        list[str] | None, typer.Option("--from-ssh-config", metavar="HOST", help="A Host of ~/.ssh/config; repeatable.")
    ] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", "-i", metavar="FILE", help="The key for hosts whose line names none.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-O", metavar="FILE", help="The file to write.")] = Path(
        "mesh.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, and trust host keys that are new.")] = False,
) -> None:
    """Write a commented mesh.yaml after looking at what is there: servers, models, GPUs.

    Servers on this machine's usual ports are found by themselves. `--from -` reads the hosts from standard input: ssh
    command lines, or the JSON that RunPod's API and `vastai show instances --raw` give. Without --from and
    --from-ssh-config it asks for the hosts, if it runs on a terminal and without --yes. A host where no server answers
    is written down all the same, with the reason, and the exit code is 3.

    \b
    Examples:
      gpumesh init --from 'ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id_ed25519'
      gpumesh init --from iceland='ssh root@203.0.113.7 -p 13323' --from-ssh-config workstation
      vastai show instances --raw | gpumesh init --from - --yes
    """
    options = global_options(ctx)
    check_output(output, force=force)
    ssh_lines, pods = read_hosts(from_ or ())
    no_host_named = not from_ and not from_ssh_config
    may_ask = sys.stdin.isatty() and not yes  # --yes: a script, which must not be asked anything
    if no_host_named and may_ask:
        ssh_lines = ask_for_hosts(check=partial(_check_line, output=output))
    for pod in pods:
        if pod.unreachable_reason is not None:
            typer.echo(clean_line(f"{pod.name} is left out: {pod.unreachable_reason}"), err=True)
    drafts = make_drafts(mark_aliases(ssh_lines), from_ssh_config or (), pods, identity=identity)
    write_new_file(output, drafts, force=force, yes=yes, quiet=options.quiet)


def _check_line(line: SshLine, output: Path) -> None:
    """Raises UsageError for a host that cannot stand in a mesh.yaml."""
    new_file_topology(output.resolve())(make_host_drafts(mark_aliases([line]), ()))
