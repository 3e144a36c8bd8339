"""The gateways that share the nodes of a mesh, as `status` shows them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from rich.cells import cell_len

from gpumesh.cli.views.status.status_view import ViewOptions
from gpumesh.state import MeshGatewayState, MeshState
from tests.cli.states import AT, healthy, mesh
from tests.cli.views.status.drawing import draw_lines, draw_text


def gateway(host: str, in_flight: int = 2, queued: int = 0, *, own: bool = False) -> MeshGatewayState:
    return MeshGatewayState("a" * 16, host, 4711, "1.2.3", AT - timedelta(hours=2), in_flight, queued, own)


def shared(*others: MeshGatewayState) -> MeshState:
    return replace(mesh(healthy("a")), gateways=(gateway("laptop", own=True), *others))


def test_a_mesh_with_other_gateways_has_a_line_for_them() -> None:
    shown = draw_lines(shared(gateway("backend", 12, 3)), 80)
    assert shown[-1] == "2 gateways: laptop (this one): 2 in flight · backend: 12 in flight, 3 queued"
    line = "2 gateways: laptop pid 4711 (this one): 2 in flight · laptop pid 4711: 1 in flight"
    assert draw_lines(shared(gateway("laptop", 1)), 100)[-1] == line
    assert "gateway" not in draw_text(shared(), 80)
    assert "gateway" not in draw_text(mesh(healthy("a")), 80)


@pytest.mark.parametrize("width", [12, 20, 40, 60, 80, 200])
@pytest.mark.parametrize("count", [1, 10, 200])
def test_the_line_fits_and_counts_those_without_room(width: int, count: int) -> None:
    others = [gateway(f"host-{number}") for number in range(count)]
    [line] = [line for line in draw_lines(shared(*others), width) if line.startswith(f"{count + 1} g"[:width])][-1:]
    assert cell_len(line) <= width
    if width >= 60 and count > 5:
        shown = line.count("in flight")
        assert f"{count + 1 - shown} more" in line or shown == count + 1


def test_with_v_all_gateways_are_in_a_table() -> None:
    shown = draw_text(shared(gateway("back\x1b[31mend", 12, 3)), 100, ViewOptions(verbose=True))
    assert "GATEWAY" in shown
    assert "2 gateways" not in shown, "the table says the same"
    [row] = [line for line in shown.splitlines() if line.strip().startswith("backend ")]
    assert row.split() == ["backend", "4711", "1.2.3", "2h", "12", "3"]
    assert "this one" in draw_text(shared(), 100, ViewOptions(verbose=True))


def test_the_line_takes_a_line_of_a_screen() -> None:
    state = replace(shared(gateway("backend")), nodes=tuple(healthy(f"n{number}") for number in range(30)))
    for height in range(8, 40):
        assert len(draw_lines(state, 100, ViewOptions(height=height))) <= height
