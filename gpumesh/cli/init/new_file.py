"""Writes a new mesh.yaml after a look at what is there: for `init`, and for `node add` where no file is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from gpumesh.cli.init.confirm_keys import confirm_host_keys
from gpumesh.cli.init.mesh_yaml import mesh_yaml_lines
from gpumesh.cli.init.node_drafts import Draft, summarize_draft
from gpumesh.cli.init.output_file import write_output
from gpumesh.cli.init.probe_drafts import new_file_topology, probe_drafts
from gpumesh.cli.open_session import run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, UsageError
from gpumesh.text.quoting import shell_word


def write_new_file(output: Path, drafts: Sequence[Draft], *, force: bool, yes: bool, quiet: bool) -> None:
    """Probes the drafts, writes the file and prints what was found. Ends the command with exit code 3 if a host has no
    server that answers. Raises UsageError and NotConfirmed, and then no file was written."""
    read_topology = new_file_topology(output.resolve())
    confirm_host_keys(read_topology(drafts), yes=yes, consequence="no mesh.yaml was written")
    if not quiet:
        host_count = sum(draft.ssh is not None for draft in drafts)
        places = "this machine"
        if host_count > 0:
            places = f"{host_count} host{'' if host_count == 1 else 's'} and this machine"
        typer.echo(f"looking at {places} …", err=True)
    probed_drafts = run_async(probe_drafts(drafts, read_topology))
    # A host that a person named is listed even if nothing answers there. A local port only if a server answers.
    listed_drafts = [draft for draft in probed_drafts if draft.ssh is not None or draft.is_serving]
    if not listed_drafts:
        raise UsageError(
            "there is no inference server on this machine, and no other place was named",
            hint="gpumesh init --from 'ssh root@HOST -p PORT'",
        )
    write_output(output, "\n".join(mesh_yaml_lines(listed_drafts)) + "\n", force=force)
    if not quiet:
        _print_drafts(listed_drafts)
    _print_next_step(output, listed_drafts)
    if not all(draft.is_serving for draft in listed_drafts):
        raise typer.Exit(int(ExitCode.DEGRADED))


def print_hints(drafts: Sequence[Draft]) -> None:
    """Prints to stderr what to do about each host whose server does not answer."""
    for draft in drafts:
        if draft.state is not None and not draft.is_serving and draft.state.tunnel.hint:
            typer.echo(clean_line(f"{draft.name}: {draft.state.tunnel.hint}"), err=True)


def _print_drafts(drafts: Sequence[Draft]) -> None:
    """Prints the result of each probe to stderr, with a hint for a host that was not reached."""
    for draft in drafts:
        typer.echo(summarize_draft(draft), err=True)
        if draft.state is None or draft.is_serving:  # was not probed, or needs no hint
            continue
        if draft.state.tunnel.hint:
            typer.echo(clean_line(f"  hint: {draft.state.tunnel.hint}"), err=True)


def _print_next_step(output: Path, drafts: Sequence[Draft]) -> None:
    """Prints to stdout the file's name with a command to try next."""
    config_option = "" if output == Path("mesh.yaml") else f" -c {shell_word(str(output))}"
    if any(draft.is_serving for draft in drafts):
        typer.echo(clean_line(f"wrote {output}; try it: gpumesh run{config_option} 'Hello'"))
    else:
        typer.echo(clean_line(f"wrote {output}; when a server is there: gpumesh audit{config_option}"))
