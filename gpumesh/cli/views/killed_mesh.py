"""Tells a person that the mesh of this configuration was killed or has crashed, when, and what was in flight."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError, MeshNotRunning
from gpumesh.state import Finding, MeshState, Severity

if TYPE_CHECKING:
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.daemon.run_record import KilledMesh

LOCK_RELEASE_S = 1.0  # for the lock of a process that was killed; one that ends in order may need longer
LOCK_POLL_S = 0.02
HINT = "`gpumesh up -d` starts it again; `gpumesh service install` lets the system do that"


def describe_killed_mesh(killed: KilledMesh) -> str:
    """One sentence about it, without its end: a full stop or more text follows."""
    return clean_line(f"the mesh that ran for this file {killed}")


def print_killed_mesh(paths: MeshPaths, *, then: str = "") -> None:
    """Prints the sentence to stderr if the last mesh was killed. ``then``: what the command does now."""
    from gpumesh.daemon.run_record import find_killed_mesh

    killed = find_killed_mesh(paths)
    if killed is not None:
        typer.echo(f"{describe_killed_mesh(killed)}{f': {then}' if then else ''} ({HINT})", err=True)


def add_finding(state: MeshState, killed: KilledMesh | None) -> MeshState:
    """The state with a finding about the killed mesh, if there is one."""
    if killed is None:
        return state
    finding = Finding("mesh-killed", Severity.WARNING, None, describe_killed_mesh(killed), HINT)
    return replace(state, findings=(*state.findings, finding))


def explain_end(paths: MeshPaths, error: GPUMeshError) -> GPUMeshError:
    """The error for a command whose mesh has ended: ``error``, or one that says that the mesh was killed. If the mesh
    still ends in order, this waits for ``LOCK_RELEASE_S`` at most."""
    from gpumesh.daemon.run_record import find_killed_mesh

    # The kernel closes the files of a killed process one after the other: the lock may follow the control socket.
    deadline = time.monotonic() + LOCK_RELEASE_S
    while (killed := find_killed_mesh(paths)) is None and paths.run_record.exists() and time.monotonic() < deadline:
        time.sleep(LOCK_POLL_S)
    return error if killed is None else MeshNotRunning(describe_killed_mesh(killed), hint=HINT)
