from __future__ import annotations

from dataclasses import replace

from gpumesh.cli.views.status.status_view import ViewOptions
from gpumesh.state import (
    ProcessState,
)
from tests.cli.states import gpu, healthy, mesh
from tests.cli.views.status.drawing import draw_lines, draw_text


def test_processes_are_sorted_by_memory() -> None:
    procs = (ProcessState(1, "small", 10), ProcessState(2, "of unknown size"), ProcessState(3, "large", 9000))
    state = mesh(healthy("a", gpus=(replace(gpu(), processes=procs),)))
    shown = draw_lines(state, 120, ViewOptions(verbose=True))
    rows = [line.split() for line in shown[shown.index(next(line for line in shown if "PID" in line)) + 2 :]]
    assert [row[2] for row in rows] == ["3", "1", "2"]
    assert rows[0][3:] == ["9000", "large"]
    assert "no process is seen" in draw_text(mesh(healthy("a", gpus=())), 120, ViewOptions(verbose=True))
