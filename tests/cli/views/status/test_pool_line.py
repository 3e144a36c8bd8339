from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from gpumesh.state import (
    GatewayState,
)
from tests.cli.states import healthy, mesh, typical
from tests.cli.views.status.drawing import draw_lines, draw_text, row_of


def test_the_pool_line() -> None:
    shown = draw_text(typical(), 160)
    line = "2 of 4 nodes up · 3 GPUs · 21.6 of 72.0 GiB free · 154 tok/s · 1 in flight"
    assert f"{line} · a 14B Q4 fits on 1 node, a 3B on 2\n" in shown
    queued = replace(typical(), gateway=GatewayState(in_flight=2, queued=7))
    assert "2 in flight · 7 queued" in draw_text(queued)
    assert "1 of 1 node up · 1 GPU ·" in draw_text(mesh(healthy("a")))


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_the_pool_line_drops_whole_parts(width: int) -> None:
    (line,) = [line for line in draw_lines(typical(), width) if "nodes up" in line]
    assert "…" not in line
    assert cell_len(line) <= width


def test_nothing_in_flight_means_no_tokens() -> None:
    busy, idle = healthy("a"), replace(healthy("b"), load=replace(healthy("b").load, in_flight=0))
    assert " 73  1/1 " in row_of("a", mesh(busy, idle))
    assert "  0  0/1 " in row_of("b", mesh(busy, idle))
    assert "· 73 tok/s ·" in draw_text(mesh(busy, idle))
    assert "· 0 tok/s ·" in draw_text(mesh(idle))
