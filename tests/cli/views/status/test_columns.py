"""The table of `status`: which columns there are, and what their cells show."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from rich.cells import cell_len

from gpumesh.cli.views.status.columns import COLUMNS, bar_text
from gpumesh.cli.views.status.rows import make_rows
from gpumesh.cli.views.status.status_view import ViewOptions
from gpumesh.mesh.history import History, HistorySeries
from gpumesh.state import BackendState, LoadedModel
from tests.cli.states import AT, gpu, healthy, mesh, typical
from tests.cli.views.status.drawing import draw_lines, draw_text, row_of

TITLES = {
    60: "NODE HEALTH MEMORY GiB UTIL BUSY",
    80: "NODE HEALTH GPU MEMORY GiB UTIL BUSY",
    120: "NODE HEALTH GPU MEMORY GiB UTIL TEMP LOADED TOK/S BUSY RTT",
    200: "NODE HEALTH GPU MEMORY GiB UTIL TEMP POWER LOADED TOK/S BUSY RTT TUNNEL BACKEND SERVED",
}


@pytest.mark.parametrize("width", TITLES)
def test_each_width_has_the_columns_that_fit(width: int) -> None:
    shown = draw_lines(typical(), width)
    assert " ".join(shown[1].split()) == TITLES[width]
    assert max(map(cell_len, shown)) <= width


def test_the_loaded_models_outlive_the_temperature() -> None:
    titles = [draw_lines(typical(), width)[1].split() for width in range(40, 200)]
    assert any("LOADED" in shown and "TEMP" not in shown for shown in titles)
    assert all("LOADED" in shown for shown in titles if "TEMP" in shown or "RTT" in shown)
    without_models = mesh(replace(healthy("a"), backend=BackendState("ollama")))
    assert "TEMP" in draw_text(without_models, 80), "no node has LOADED, so no room is kept for it"


def test_cells_are_aligned_with_their_titles() -> None:
    shown = draw_lines(typical(), 200)
    for title, value in (("BUSY", "1/1 +2"), ("RTT", "41 ms"), ("TEMP", "61°"), ("POWER", "212/450 W")):
        end = shown[1].index(title) + len(title)
        assert shown[3][:end].endswith(value), title


def test_the_row_of_a_healthy_node() -> None:
    row = row_of("iceland", typical())
    for part in ("● iceland", "healthy", "RTX 4090", "5.5/24.0", "42%", "61°", "212/450 W", "qwen2.5:7b 4m", "73",
                 "1/1 +2", "41 ms", "sshtunnel up 4m ↻1", "ollama 0.12.6", "120"):  # fmt: skip
        assert part in row, part


def test_a_pool_is_told_apart_from_a_node() -> None:
    row = row_of("big", mesh(replace(healthy("big"), pool_members=("iceland", "vengeance"))))
    assert "● big pool  healthy" in row


def test_unknown_is_a_dash_and_never_zero() -> None:
    row = row_of("runpod", typical())
    assert "0.0" not in row
    assert "%" not in row
    assert row.split()[:4] == ["✗", "runpod", "down", "–"]  # noqa: RUF001


def test_several_gpus_of_a_host_have_their_index() -> None:
    state = mesh(healthy("v", gpus=(gpu(0), gpu(1, name="NVIDIA H100 80GB HBM3", busy=3))))
    rows = [line for line in draw_lines(state, 160) if "RTX 4090" in line or "H100" in line]
    assert "0 RTX 4090" in rows[0]
    assert "1 H100 80GB HBM3" in rows[1]
    assert rows[1].startswith("   ")
    assert "healthy" not in rows[1]


def test_no_gpus_and_a_slice_of_one() -> None:
    assert " none " in row_of("a", mesh(healthy("a", gpus=()), healthy("b")))
    part = replace(gpu(), uuid="MIG-1234", name="NVIDIA H100 80GB HBM3", utilization_pct=None)
    row = row_of("a", mesh(healthy("a", gpus=(part,)), healthy("b")))
    assert "MIG H100 80GB HBM3" in row
    part = replace(part, name="NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    assert "MIG 1g.10g" in row_of("a", mesh(healthy("a", gpus=(part, part)), healthy("b")), 80), "not only the card"


def test_a_wide_terminal_shows_names_in_full() -> None:
    long = healthy("a-node-with-a-long-name", gpus=(replace(gpu(), name="NVIDIA RTX PRO 6000 Blackwell Server"),))
    state = mesh(*typical().nodes, long)
    row = row_of("a-node-with-a-long-name", state, 200)
    assert "RTX PRO 6000 Blackwell Server" in row


def test_models_in_memory() -> None:
    def loaded(*models: LoadedModel) -> str:
        node = healthy("a")
        return row_of("a", mesh(replace(node, backend=replace(node.backend, loaded=models))), 250)

    soon = AT + timedelta(seconds=30)
    assert "m:7b 30s " in loaded(LoadedModel("m:7b", 5, 5, soon))
    assert "m:7b ∞ " in loaded(LoadedModel("m:7b", 5, 5, AT + timedelta(days=40_000)))
    assert "m:7b (40% CPU) 30s" in loaded(LoadedModel("m:7b", 60, 100, soon))
    assert " Llama-3.3-70B:Q4_K_M 30s " in loaded(LoadedModel("hf.co/bartowski/Llama-3.3-70B:Q4_K_M", 5, 5, soon))
    assert "a, b +2" in loaded(*(LoadedModel(name) for name in "abcd"))
    assert "(2 on disk)" in loaded()


def test_the_last_minute() -> None:
    history = History(gpus=(HistorySeries(gpu().uuid, (None, None, 0.0, 50.0, 100.0)),))
    shown = draw_lines(mesh(healthy("a")), 200, ViewOptions(history=history))
    assert "LAST MIN" in shown[1]
    assert "  ▁▅█ " in shown[3]
    assert "LAST MIN" not in draw_text(mesh(healthy("a")))


@pytest.mark.parametrize(
    ("part", "bar"),
    [(None, "░░░░"), (0.0, "░░░░"), (0.005, "░░░░"), (0.01, "█░░░"), (0.5, "██░░"), (0.99, "████"), (7.0, "████")],
)
def test_bars(part: float | None, bar: str) -> None:
    assert bar_text(part, 4).plain == bar


def test_a_busy_gpu_is_no_fault() -> None:
    assert {str(bar_text(part, 4).spans[0].style) for part in (0.05, 0.3, 0.96, 1.0)} == {"cyan"}


def test_heat_is_a_warning() -> None:
    def style(**changes: Any) -> str:
        state = mesh(healthy("a", gpus=(replace(gpu(), **changes),)))
        (row,) = make_rows(state, selected=None, history=History())
        (draw_cell,) = (cell for column, cell in COLUMNS if column.title == "TEMP")
        return str(draw_cell(row, 4).style)

    assert style(temperature_c=61) == ""
    assert style(temperature_c=85) == "yellow"
    assert style(temperature_c=61, throttle="hw-slowdown,thermal") == "yellow"
