"""Fills in what the nodes of a mesh.yaml do not say under ``expect``: for `init --refresh`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from gpumesh.cli.first_report import INIT_FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.init.mesh_yaml import expected_facts
from gpumesh.cli.node.mesh_change import apply_change, change_file
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.config.editing import edit, node_changes
from gpumesh.config.editing.edit import Edit
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.errors import ExitCode, GPUMeshError
from gpumesh.state import BackendPhase, MeshState
from gpumesh.topology import NodeSpec


def refresh_expectations(options: GlobalOptions) -> None:
    """Asks all nodes what they have, and adds what ``expect`` lacks to the file. What it has already stays: `audit`
    compares it. Ends the command with exit code 3 if a node was not seen. Raises GPUMeshError."""
    path = options.config_file()
    topology = edit.parse_edited(path, edit.read(path))
    if not options.quiet:
        typer.echo("looking at all nodes …", err=True)
    state = run_async(_read_state(options))
    seen = {node.name: node for node in state.nodes if node.backend.state is BackendPhase.UP}
    wanted = {
        spec.name: _find_missing(spec, expected_facts(seen[spec.name])) for spec in topology.nodes if spec.name in seen
    }
    problems: list[str] = []

    def change(text: str) -> ChangedText:
        """Adds the facts that are wanted. A node that cannot be changed is left out, with its reason in
        ``problems``."""
        problems.clear()
        changed = ChangedText(text, edit.parse_edited(path, text))
        for name, facts in wanted.items():
            try:
                changed = _add_facts(path, changed, name, facts)
            except GPUMeshError as error:  # this node is written in a way that only a person can change
                problems.append(f"{name}: {error.message}")
        return changed

    changed = change_file(path, change)
    unseen = [spec.name for spec in topology.nodes if spec.enabled and spec.name not in seen]
    for name, facts in wanted.items():
        if facts:
            typer.echo(
                clean_line(f"{name}: {', '.join(f'{key} {_format_fact(value)}' for key, value in facts.items())}")
            )
    for problem in problems:
        typer.echo(clean_line(f"by hand: {problem}"), err=True)
    for name in unseen:
        typer.echo(clean_line(f"{name} was not seen, and stays as it is"), err=True)
    if changed.topology == topology:
        typer.echo("nothing was to be filled in")
    else:
        apply_change(options, changed.topology)
    if unseen or problems:
        raise typer.Exit(int(ExitCode.DEGRADED))


async def _read_state(options: GlobalOptions) -> MeshState:
    async with open_session(options, announce_change=False) as session:
        return await session.wait_first_report(INIT_FIRST_REPORT_TIMEOUT_S)


def _find_missing(spec: NodeSpec, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of which ``expect`` says nothing."""
    return {key: value for key, value in facts.items() if getattr(spec.expect, key) in (None, ())}


def _add_facts(path: Path, changed: ChangedText, name: str, facts: dict[str, Any]) -> ChangedText:
    """Adds the facts to the node's ``expect``. Raises UsageError for a node that is gone, and CannotEdit."""
    edits = [Edit(0, ("expect", key), value) for key, value in facts.items()]
    return node_changes.set_values(path, changed.text, name, edits)


def _format_fact(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
