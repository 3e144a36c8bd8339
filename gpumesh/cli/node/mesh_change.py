"""Changes mesh.yaml under its lock, lets the running mesh read it, and says what the pool has then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import typer

from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.views.figures import format_gib
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.config.editing import edit, node_changes
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.config.live_changes import ReloadReport
from gpumesh.errors import GPUMeshError, MeshNotRunning, TunnelError
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


def apply_change(options: GlobalOptions, topology: Topology) -> None:
    """Lets the running mesh read the changed file, and prints one line about what the pool has now.

    If no mesh runs, or if it does not take the change, the line is about the file, and a line on stderr says why: the
    file is changed all the same. ``topology`` is what the file says now."""
    reason = "no mesh is running: `gpumesh up -d` starts it"
    try:
        state, report = run_async(_reload(options))
    except MeshNotRunning:
        pass
    except GPUMeshError as error:
        reason = f"mesh.yaml is changed, but the running mesh does not take it: {error.message}"
        if error.hint:
            reason += f" ({error.hint})"
    else:
        typer.echo(clean_line(f"the pool now has {_describe_state(state)}"))
        if not options.quiet:
            _print_remarks(report)
        return
    typer.echo(clean_line(f"mesh.yaml now has {_describe_topology(topology)}"))
    if not options.quiet:
        typer.echo(clean_line(reason), err=True)


async def _reload(options: GlobalOptions) -> tuple[MeshState, ReloadReport]:
    """Lets the running mesh read its file. Returns its state when new nodes were probed, and what the mesh has taken
    over. Raises MeshNotRunning, and GPUMeshError if the mesh refuses the file."""
    async with open_session(options, embed=False, announce_change=False) as session:
        report = await session.reload()
        return await session.wait_first_report(FIRST_REPORT_TIMEOUT_S), report


def _print_remarks(report: ReloadReport) -> None:
    """Prints to stderr what a person may not expect of the running mesh now."""
    for node in report.leaving:
        requests = "its request" if node.in_flight == 1 else f"its {node.in_flight} requests"
        typer.echo(clean_line(f"{node.name}: {requests} in flight may end; then its tunnel closes"), err=True)
    for name in report.not_opened:
        typer.echo(clean_line(f"{name} is left alone, because `gpumesh up` named other nodes"), err=True)
    for change in report.after_restart:
        typer.echo(clean_line(f"{change}: takes effect after a restart"), err=True)


def forget_host_keys(old: Topology, nodes: Sequence[str]) -> None:
    """Removes the host keys on record for the names of removed nodes: another machine may get such a name later. What
    cannot be removed is no failure: the node's next `trust` asks about it."""
    from gpumesh.tunnels.known_hosts import KnownHost, forget_node

    for node in old.nodes:
        if node.name in nodes and node.ssh is not None:
            with suppress(TunnelError):
                forget_node(node.ssh.known_hosts, KnownHost(node.ssh.host, node.ssh.port, node.name, old.identity))


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
