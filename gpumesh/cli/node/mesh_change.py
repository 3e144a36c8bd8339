"""Changes mesh.yaml under its lock, lets the running mesh read it, and says what the pool has then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.views.figures import format_gib
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.config.editing import edit, node_changes
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.errors import GPUMeshError, MeshNotRunning
from gpumesh.state import MeshState
from gpumesh.topology import Topology


def change_file(path: Path, change: Callable[[str], ChangedText]) -> ChangedText:
    """Reads the file, applies ``change`` to its text and writes the result, all under the file's lock: two commands at
    once both end up in the file. Raises GPUMeshError, and then the file is as it was."""
    with node_changes.locked_file(path):
        old_text = edit.read(path)
        changed = change(old_text)
        if changed.text != old_text:
            edit.write(path, old_text, changed.text)
        return changed


def apply_change(options: GlobalOptions, topology: Topology) -> MeshState | None:
    """Lets the running mesh read the changed file, and prints one line about what the pool has now.

    Returns the state of the running mesh; ``None`` if no mesh runs, or if it could not take the change: then a line on
    stderr says so, for the file is changed all the same. ``topology`` is what the file says now."""
    state = None
    reason = "no mesh is running: `gpumesh up -d` starts it"
    try:
        state = run_async(_reload(options))
    except MeshNotRunning:
        pass
    except GPUMeshError as error:
        reason = f"mesh.yaml is changed, but the running mesh does not take it: {error.message}"
        if error.hint:
            reason += f" ({error.hint})"
    if state is not None:
        typer.echo(clean_line(f"the pool now has {_describe_state(state)}"))
        return state
    typer.echo(clean_line(f"mesh.yaml now has {_describe_topology(topology)}"))
    if not options.quiet:
        typer.echo(clean_line(reason), err=True)
    return None


async def _reload(options: GlobalOptions) -> MeshState:
    """Lets the running mesh read its file, and returns its state when new nodes were probed. Raises MeshNotRunning, and
    GPUMeshError if the mesh refuses the file."""
    async with open_session(options, embed=False, announce_change=False) as session:
        await session.reload()
        return await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)


def _describe_state(state: MeshState) -> str:
    """The nodes, GPUs and memory of a running mesh: ``2 nodes (1 up), 3 GPUs, 70.9 of 72.0 GiB free``."""
    totals = state.totals
    parts = [_count(totals.nodes, "node")]
    if totals.nodes_up != totals.nodes:
        parts[0] += f" ({totals.nodes_up} up)"
    if totals.gpus is not None:
        parts.append(_count(totals.gpus, "GPU"))
    if totals.vram_total_mib is not None:
        parts.append(f"{format_gib(totals.vram_free_mib)} of {format_gib(totals.vram_total_mib)} GiB free")
    return ", ".join(parts)


def _describe_topology(topology: Topology) -> str:
    """The nodes of the file, and the GPUs and the memory that it expects of them."""
    enabled = [node for node in topology.nodes if node.enabled]
    text = _count(len(topology.nodes), "node")
    if len(enabled) < len(topology.nodes):
        text += f" ({len(topology.nodes) - len(enabled)} not enabled)"
    counts = [node.expect.gpus for node in enabled]
    gpus = sum(count for count in counts if count is not None)
    if not gpus:
        return text
    text += f", {_count(gpus, 'GPU')}"
    sizes = [(node.expect.gpus or 0) * (node.expect.vram_mib or 0) for node in enabled]
    if sum(sizes):
        text += f", {format_gib(sum(sizes))} GiB"
    unknown = sum(count is None for count in counts)
    return f"{text} ({_count(unknown, 'node')} without `expect`)" if unknown else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
