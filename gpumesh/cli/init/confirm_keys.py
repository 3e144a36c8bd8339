"""Confirms the host keys of drafts with a person, before the drafts are probed."""

from __future__ import annotations

import sys

import typer

from gpumesh.cli.host_key_confirmation import NotConfirmed, confirm_key
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, GPUMeshError
from gpumesh.topology import Topology


def confirm_host_keys(topology: Topology, *, yes: bool, consequence: str) -> None:
    """Asks a person about host keys that are not on record, or records them if ``yes``: otherwise a probe with a strict
    policy would fail. Does nothing if nobody can be asked. Raises NotConfirmed if a person says no; its message ends
    with ``consequence``."""
    nobody_can_agree = not yes and not sys.stdin.isatty()
    if nobody_can_agree:
        return
    for spec in topology.nodes:
        if spec.ssh is None:
            continue
        try:
            confirm_key(spec, spec.ssh, mesh=topology.identity, yes=yes)
        except typer.Abort:  # Ctrl-C at the question
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        except NotConfirmed as error:
            raise NotConfirmed(f"{error.message}; {consequence}", hint=error.hint) from None
        except GPUMeshError as error:  # the host cannot be reached; the probe will say so too
            typer.echo(clean_line(f"{spec.name}: {error.message}"), err=True)
