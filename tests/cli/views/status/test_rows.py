"""The rows of the status table: why GPUs are missing, and which rows fit on a screen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.cli.views.status.rows import NO_GPU_REASONS
from gpumesh.cli.views.status.status_view import ViewOptions
from gpumesh.state import (
    Finding,
    Health,
    MeshState,
    Severity,
)
from tests.cli.states import down, gpu, healthy, mesh
from tests.cli.views.status.drawing import draw_lines, draw_text, row_of


@pytest.mark.parametrize(("code", "words"), NO_GPU_REASONS.items())
def test_the_row_says_why_gpus_are_missing(code: str, words: str) -> None:
    node = replace(healthy("a"), health=Health.DEGRADED, reason="x", gpus=None)
    found = Finding(code, Severity.ERROR, "a", "something")
    assert words in row_of("a", mesh(node, findings=(found,)), 120)


def test_a_lost_gpu_has_a_row_of_its_own() -> None:
    found = Finding("gpu-lost", Severity.ERROR, "v", "a GPU has fallen off the bus")
    shown = draw_lines(mesh(healthy("v", gpus=(gpu(0), gpu(2, busy=3))), findings=(found,)), 120)
    rows = shown[3:6]
    assert "0 RTX 4090" in rows[0]
    assert "2 RTX 4090" in rows[1]
    assert rows[2].strip() == "GPU lost"


def many(count: int) -> MeshState:
    nodes = [healthy(f"node-{number:03d}") for number in range(count)]
    nodes[count - 1] = down(f"node-{count - 1:03d}")
    return mesh(*nodes)


def test_rows_are_scrolled_to_the_selected_node() -> None:
    shown = "\n".join(draw_lines(many(100), 120, ViewOptions(height=24, selected="node-050")))
    assert "node-050" in shown
    assert "node-045" in shown
    assert "node-001" not in shown


def test_all_rows_are_shown_when_they_fit() -> None:
    assert "more rows" not in draw_text(many(10), 120, ViewOptions(height=30))
