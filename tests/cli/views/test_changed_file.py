"""The finding about mesh.yaml in the states that a command shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpumesh.cli.views.changed_file import replace_finding, watch_with_file
from gpumesh.config.changed_file import read_snapshot
from gpumesh.daemon.paths import MeshPaths
from gpumesh.state import Finding, MeshState, Severity
from tests.cli.states import typical
from tests.config.build import DIRECT
from tests.daemon.scripted import ScriptedSession

CHANGED = Finding("config-changed", Severity.WARNING, None, "it differs")
INVALID = Finding("config-invalid", Severity.WARNING, None, "the variable K is not set")


def codes(state: MeshState) -> list[str]:
    return [finding.code for finding in state.findings if finding.code.startswith("config")]


async def watched(session: ScriptedSession, path: Path, *, after_first: Callable[[], None] = lambda: None) -> list[Any]:
    """The codes in the first two states."""
    seen: list[list[str]] = []
    paths = MeshPaths(path, path.parent, path.parent / "log")
    async with aclosing(watch_with_file(session, paths, 0.0)) as states:
        while len(seen) < 2:
            seen.append(codes(await anext(states)))
            if len(seen) == 1:
                after_first()
    return seen


async def test_a_live_view_sees_that_the_mesh_has_taken_the_file_over(tmp_path: Path) -> None:
    """The mesh does so by itself while the view runs."""
    path, session = tmp_path / "mesh.yaml", ScriptedSession()
    path.write_text(DIRECT)
    session.snapshot = read_snapshot(path)

    def take_over() -> None:
        path.write_text(DIRECT.replace("11434", "11435"))
        session.snapshot = read_snapshot(path)

    assert await watched(session, path, after_first=take_over) == [[], []]


async def test_a_live_view_says_what_the_mesh_has_not_taken_over(tmp_path: Path) -> None:
    path, session = tmp_path / "mesh.yaml", ScriptedSession()
    path.write_text(DIRECT)
    session.snapshot = read_snapshot(path)
    path.write_text(DIRECT.replace("11434", "11435"))
    assert await watched(session, path) == [["config-changed"], ["config-changed"]]


def test_only_the_mesh_knows_that_it_could_not_take_a_valid_file_over() -> None:
    state = replace(typical(), findings=(INVALID,))
    assert replace_finding(state, CHANGED).findings == (INVALID,)
    assert replace_finding(state, None).findings == ()
    newer = replace(INVALID, message="the file is broken")
    assert replace_finding(state, newer).findings == (newer,)
