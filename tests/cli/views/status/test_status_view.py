from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from gpumesh.cli.views.status.status_view import ViewOptions, print_status
from gpumesh.state import (
    Finding,
    GatewayPhase,
    GatewayState,
    GpuState,
    Health,
    LoadedModel,
    MeshState,
    ModelInfo,
    NodeState,
    ProcessState,
    Severity,
    TunnelPhase,
)
from tests.cli.states import AT, down, healthy, mesh, typical
from tests.cli.views.status.drawing import draw_lines, draw_text

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202e[bold]"


# -- how wide it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(8, 260, 7))
def test_every_width_shows_all_nodes_and_fits(width: int) -> None:
    shown = draw_lines(typical(), width)
    assert max(map(cell_len, shown)) <= width
    table = "\n".join(shown)
    for node in typical().nodes:
        assert node.name[: max(min(width - 4, 10), 1)] in table


# -- what it says ----------------------------------------------------------------------------------------------------


def test_simulated_hosts_are_marked() -> None:
    assert "simulated hosts" in draw_text(mesh(replace(healthy("a"), simulated=True)))
    assert "simulated" not in draw_text(mesh(healthy("a")))


def test_the_page_is_named_where_there_is_room() -> None:
    assert draw_lines(typical(), 80)[0].startswith("home  http://127.0.0.1:11430 serving (page: /ui)  ")
    assert "page" not in draw_lines(typical(), 40)[0]
    on_socket = replace(typical(), gateway=GatewayState("unix:/run/x.sock", GatewayPhase.SERVING))
    assert "page" not in draw_text(on_socket)
    assert "page" not in draw_text(replace(typical(), gateway=GatewayState()))


# -- screens that cannot scroll --------------------------------------------------------------------------------------


def many(count: int) -> MeshState:
    nodes = [healthy(f"node-{number:03d}") for number in range(count)]
    nodes[count - 1] = down(f"node-{count - 1:03d}")
    return mesh(*nodes)


@pytest.mark.parametrize("height", [6, 10, 24, 50])
def test_the_view_fits_the_screen_and_keeps_unhealthy_nodes(height: int) -> None:
    shown = draw_lines(many(100), 120, ViewOptions(height=height))
    assert len(shown) <= max(height, 9)
    assert any(line.startswith("✗ node-099") for line in shown)
    assert any("more rows" in line for line in shown)


# -- hostile words ---------------------------------------------------------------------------------------------------


def hostile(node: NodeState) -> NodeState:
    card = GpuState(0, HOSTILE, HOSTILE, 24564, 1, 2, processes=(ProcessState(1, HOSTILE, 1),))
    backend = replace(
        node.backend,
        kind=HOSTILE,
        version=HOSTILE,
        models=(HOSTILE,),
        loaded=(LoadedModel(HOSTILE, 1, 2, AT),),
        catalog=(ModelInfo(HOSTILE, HOSTILE),),
    )
    tunnel = replace(node.tunnel, transport=HOSTILE, state=TunnelPhase.BACKOFF, hint=HOSTILE, last_error=HOSTILE)
    return replace(node, name=HOSTILE, health=Health.DOWN, reason=HOSTILE, gpus=(card,), backend=backend, tunnel=tunnel)


@pytest.mark.parametrize("width", [60, 80, 120, 200, 400])
def test_hostile_text_of_hosts_is_cleaned(width: int) -> None:
    found = Finding(HOSTILE, Severity.ERROR, HOSTILE, HOSTILE, HOSTILE, (HOSTILE,))
    state = replace(mesh(hostile(healthy("a")), findings=(found,)), mesh=HOSTILE)
    state = replace(state, gateway=GatewayState(HOSTILE))
    shown = draw_text(state, width, ViewOptions(verbose=True))
    assert "red[bold]" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


# -- bars ------------------------------------------------------------------------------------------------------------


def test_no_colours_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_status(typical())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines() == [line for line in out.splitlines() if line == line.rstrip()]
