"""Tells a person that mesh.yaml is not what the running mesh has read from it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from gpumesh.cli.views.safe_text import clean_line
from gpumesh.state import Finding, MeshState, Severity

if TYPE_CHECKING:
    from gpumesh.config.changed_file import ChangedFile
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.daemon.sessions.session import Session


_FILE_CODES = frozenset({"config-changed", "config-invalid"})


def print_finding(finding: Finding | None) -> None:
    """Prints the finding to stderr, for commands that show no findings. A remark is left out: the mesh would run as it
    does now."""
    if finding is not None and finding.severity is not Severity.INFO:
        typer.echo(clean_line(f"{finding.message} ({finding.hint})"), err=True)


def add_finding(state: MeshState, changed_file: ChangedFile) -> MeshState:
    """The state with the finding about mesh.yaml as it is now, if there is one."""
    return replace_finding(state, changed_file.find())


def replace_finding(state: MeshState, finding: Finding | None) -> MeshState:
    """The state with this finding about mesh.yaml, or none, instead of the mesh's own, which is some seconds old.

    Only the mesh knows that it could not take over a file that is valid: then its own finding stays."""
    others = tuple(other for other in state.findings if other.code not in _FILE_CODES)
    own = next((other for other in state.findings if other.code == "config-invalid"), None)
    if finding is not None and finding.code == "config-changed" and own is not None:
        finding = own
    return replace(state, findings=others if finding is None else (*others, finding))


async def watch_with_file(session: Session, paths: MeshPaths, interval_s: float) -> AsyncGenerator[MeshState]:
    """Yields the states of ``session.watch``, each with the finding about mesh.yaml as it is then."""
    from gpumesh.config.changed_file import ChangedFile
    from gpumesh.event_loop.async_iterators import closing_iterator

    snapshot = await session.configuration()
    changed_file = ChangedFile(paths.config, snapshot)
    async with closing_iterator(session.watch(interval_s)) as states:
        async for state in states:
            if changed_file.find() is not None:  # the mesh may have taken the file over meanwhile
                newer = await session.configuration()
                if newer != snapshot:
                    snapshot, changed_file = newer, ChangedFile(paths.config, newer)
            yield add_finding(state, changed_file)


def watch_running_file(paths: MeshPaths) -> ChangedFile:
    """Compares mesh.yaml with what the running mesh has read from it, without an event loop."""
    from gpumesh.config.changed_file import ChangedFile
    from gpumesh.config.comparison import ConfigSnapshot
    from gpumesh.daemon.control_socket.quick_status import fetch_configuration
    from gpumesh.wire import from_json

    document = fetch_configuration(paths.socket)
    snapshot = None if document is None else from_json(ConfigSnapshot, document)
    return ChangedFile(paths.config, snapshot)
