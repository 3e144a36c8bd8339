"""The remarks below the status table: each reason once, with its hint, and no more than fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.cli.views.status.status_view import ViewOptions
from gpumesh.state import (
    Finding,
    Health,
    Severity,
)
from tests.cli.states import down, healthy, mesh, typical
from tests.cli.views.status.drawing import draw_lines, draw_text


def test_a_reason_is_shown_once_with_its_hint() -> None:
    shown = draw_text(typical())
    assert shown.count("nothing listens on 203.0.113.7:22") == 1
    assert "✗ runpod down: nothing listens on 203.0.113.7:22 (again in 4s)\n  → is the pod running?" in shown
    assert "! vengeance gpu-missing: mesh.yaml expects 3 GPUs, 2 are there\n  → if that is right" in shown


def test_the_reason_of_a_node_that_is_up_has_the_hint_of_its_finding() -> None:
    message = "the NVIDIA driver does not answer"
    node = replace(healthy("a"), health=Health.DEGRADED, reason=message, gpus=None)
    found = Finding("driver-broken", Severity.ERROR, "a", message, "modprobe nvidia")
    shown = draw_text(mesh(node, findings=(found,)))
    assert shown.count(message) == 1
    assert "→ modprobe nvidia" in shown


def test_equal_findings_of_many_nodes_are_merged() -> None:
    nodes = [healthy(f"n{number}", gpus=None) for number in range(100)]
    missing = Finding("nvidia-smi-missing", Severity.INFO, None, "nvidia-smi is on no usual path", "install it")
    findings = [replace(missing, node=node.name) for node in nodes]
    other = replace(missing, node="n7", message="something else")
    shown = draw_text(mesh(*nodes, findings=(*findings, other)), 120)
    assert shown.count("nvidia-smi is on no usual path") == 1
    assert "i n0, n1, n2, n3 and 96 more nvidia-smi-missing: nvidia-smi is on no usual path" in shown
    assert "i n7 nvidia-smi-missing: something else" in shown
    assert shown.count("install it") == 2
    assert "i n0, n1 nvidia" in draw_text(mesh(*nodes, findings=tuple(findings[:2])), 120)
    assert "i n1 nvidia" in draw_text(mesh(*nodes, findings=(findings[1],)), 120)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("height", [20, 30, 40])
def test_remarks_of_several_lines_are_never_cut_off(width: int, height: int) -> None:
    long = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver; " * 2
    nodes = [replace(healthy(f"node-{number:03d}"), health=Health.DEGRADED, reason=long) for number in range(20)]
    shown = draw_lines(mesh(*nodes), width, ViewOptions(height=height))
    assert len(shown) <= height
    assert "remarks: `gpumesh" in shown[-1] or "20 remarks hidden" in shown[-1]
    room = height - 4 if height >= 24 else height - 5  # without the line that counts hidden rows
    rows = [line for line in shown if line.startswith("◐ node-") and "NVIDIA-SMI" not in line]
    assert len(rows) == min(room, 20), "no node gives its row to a remark"


def test_remarks_get_the_lines_that_the_rows_leave_free() -> None:
    nodes = [replace(healthy(f"n{number}"), health=Health.DEGRADED, reason=f"because {number}") for number in range(4)]
    for height in range(8, 14):
        shown = draw_lines(mesh(*nodes), 80, ViewOptions(height=height))
        assert len(shown) <= height
        assert sum(line.startswith("◐ n") and "because" not in line for line in shown) == 4
        assert sum("because" in line for line in shown) == {8: 0, 9: 0, 10: 1, 11: 2}.get(height, 4)
        assert ("4 remarks hidden" in "\n".join(shown)) == (height == 8)


def test_no_count_of_remarks_when_all_are_shown() -> None:
    assert "remark" not in draw_text(mesh(down("a"), healthy("b")), 80, ViewOptions(height=40))
    assert "remark" not in draw_text(mesh(*(down(f"n{number}") for number in range(30))), 80), "it scrolls"
