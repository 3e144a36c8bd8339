"""`gpumesh init`: writes a mesh.yaml from ssh command lines, after a probe of their hosts.

Further parts of the command are in `cli/init/`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.host_key_confirmation import NotConfirmed, confirm_key
from gpumesh.cli.init.host_input import ask_for_hosts, read_hosts
from gpumesh.cli.init.mesh_yaml import mesh_yaml_lines
from gpumesh.cli.init.node_drafts import Draft, make_drafts, summarize_draft
from gpumesh.cli.init.output_file import check_output, write_output
from gpumesh.cli.init.probe_drafts import probe_drafts, topology_of
from gpumesh.cli.open_session import run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, GPUMeshError, UsageError
from gpumesh.text.quoting import shell_word

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
        ssh_lines = ask_for_hosts()
    for pod in pods:
        if pod.unreachable_reason is not None:
            typer.echo(clean_line(f"{pod.name} is left out: {pod.unreachable_reason}"), err=True)
    drafts = make_drafts(ssh_lines, from_ssh_config or (), pods, identity=identity)
    source = output.resolve()
    _confirm_host_keys(drafts, source, yes=yes)
    if not options.quiet:
        host_count = sum(draft.ssh is not None for draft in drafts)
        places = "this machine"
        if host_count > 0:
            places = f"{host_count} host{'' if host_count == 1 else 's'} and this machine"
        typer.echo(f"looking at {places} …", err=True)
    probed_drafts = run_async(probe_drafts(drafts, source))
    # A host that a person named is listed even if nothing answers there. A local port only if a server answers.
    listed_drafts = [draft for draft in probed_drafts if draft.ssh is not None or draft.is_serving]
    if not listed_drafts:
        raise UsageError(
            "there is no inference server on this machine, and no other place was named",
            hint="gpumesh init --from 'ssh root@HOST -p PORT'",
        )
    write_output(output, "\n".join(mesh_yaml_lines(listed_drafts)) + "\n", force=force)
    _print_report(options, output, listed_drafts)
    if not all(draft.is_serving for draft in listed_drafts):
        raise typer.Exit(int(ExitCode.DEGRADED))


def _confirm_host_keys(drafts: Sequence[Draft], source: Path, *, yes: bool) -> None:
    """Asks a person about host keys that are not on record, or records them if ``yes``: otherwise a probe with a strict
    policy would fail. ``source``: the mesh.yaml that will be written. Does nothing if nobody can be asked. Raises
    NotConfirmed if a person says no."""
    nobody_can_agree = not yes and not sys.stdin.isatty()
    if nobody_can_agree:
        return
    topology = topology_of(drafts, source)
    for spec in topology.nodes:
        if spec.ssh is None:
            continue
        try:
            confirm_key(spec, spec.ssh, mesh=topology.identity, yes=yes)
        except typer.Abort:  # Ctrl-C at the question
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        except NotConfirmed as error:
            raise NotConfirmed(f"{error.message}; no mesh.yaml was written", hint=error.hint) from None
        except GPUMeshError as error:  # the host cannot be reached; the probe will say so too
            typer.echo(clean_line(f"{spec.name}: {error.message}"), err=True)


def _print_report(options: GlobalOptions, output: Path, drafts: Sequence[Draft]) -> None:
    """Prints the result of each probe to stderr, and to stdout the file's name with a command to try next."""
    if not options.quiet:
        for draft in drafts:
            typer.echo(summarize_draft(draft), err=True)
            if draft.state is None or draft.is_serving:  # was not probed, or needs no hint
                continue
            if draft.state.tunnel.hint:
                typer.echo(clean_line(f"  hint: {draft.state.tunnel.hint}"), err=True)
    config_option = "" if output == Path("mesh.yaml") else f" -c {shell_word(str(output))}"
    if any(draft.is_serving for draft in drafts):
        typer.echo(clean_line(f"wrote {output}; try it: gpumesh run{config_option} 'Hello'"))
    else:
        typer.echo(clean_line(f"wrote {output}; when a server is there: gpumesh audit{config_option}"))
