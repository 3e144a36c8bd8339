"""`gpumesh init`: writes a mesh.yaml from ssh command lines, after a probe of their hosts.

Further parts of the command are in `cli/init/`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.init.host_input import ask_for_hosts, mark_aliases, read_hosts, show_typed_hosts
from gpumesh.cli.init.new_file import write_new_file
from gpumesh.cli.init.node_drafts import make_drafts, make_host_drafts
from gpumesh.cli.init.output_file import check_output
from gpumesh.cli.init.probe_drafts import new_file_topology
from gpumesh.cli.init.ssh_command_line import SshLine
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError

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
    output_option: Annotated[
        Path | None, typer.Option("--output", "-O", metavar="FILE", help="The file to write (else mesh.yaml).")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Fill in what `expect` lacks, in a mesh.yaml that is there.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, and trust host keys that are new.")] = False,
) -> None:
    """Write a commented mesh.yaml after looking at what is there: servers, models, GPUs.

    Each host is asked on which ports it listens; servers on this machine's usual ports are found, too. `--from -` reads
    the hosts from standard input: ssh command lines, or the JSON that RunPod's API and `vastai show instances --raw`
    give. Without --from and --from-ssh-config it asks for the hosts, if it runs on a terminal and without --yes. A host
    where no server answers is written down all the same, with the reason, and the exit code is 3. If mesh.yaml is there
    already, it offers to add the hosts to it, as `gpumesh node add` does.

    \b
    Examples:
      gpumesh init --from 'ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id_ed25519'
      gpumesh init --from iceland='ssh root@203.0.113.7 -p 13323' --from-ssh-config workstation
      vastai show instances --raw | gpumesh init --from - --yes
    """
    options = global_options(ctx)
    if refresh:
        from gpumesh.cli.node.refresh import refresh_expectations

        refresh_expectations(options if output_option is None else replace(options, config=output_option))
        return
    output = output_option or Path("mesh.yaml")
    may_ask = sys.stdin.isatty() and not yes  # --yes: a script, which must not be asked anything
    adds_to_file = may_ask and not force and output.is_file()
    if adds_to_file:
        adds_to_file = typer.confirm(clean_line(f"{output} is there already. Add hosts to it?"), default=True, err=True)
    if not adds_to_file:
        check_output(output, force=force)
    ssh_lines, pods = read_hosts(from_ or ())
    typed_texts: list[str] = []
    no_host_named = not from_ and not from_ssh_config
    if no_host_named and may_ask:
        ssh_lines, typed_texts = ask_for_hosts(check=partial(_check_line, output=output))
    for pod in pods:
        if pod.unreachable_reason is not None:
            typer.echo(clean_line(f"{pod.name} is left out: {pod.unreachable_reason}"), err=True)
    hosts = (mark_aliases(ssh_lines), from_ssh_config or (), pods)
    try:
        if adds_to_file:
            from gpumesh.cli.node.added_hosts import add_hosts

            drafts = make_host_drafts(*hosts, identity=identity)
            add_hosts(replace(options, config=output), drafts, name=None, force=False, yes=yes)
        else:
            drafts = make_drafts(*hosts, identity=identity)
            write_new_file(output, drafts, force=force, yes=yes, quiet=options.quiet)
    except GPUMeshError:
        show_typed_hosts(typed_texts)
        raise


def _check_line(line: SshLine, output: Path) -> None:
    """Raises UsageError for a host that cannot stand in a mesh.yaml."""
    new_file_topology(output.resolve())(make_host_drafts(mark_aliases([line]), ()))
