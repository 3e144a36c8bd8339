from __future__ import annotations

from dataclasses import replace

from gpumesh.cli.views.status.status_view import ViewOptions
from gpumesh.state import DecisionState, LearnedState, LoadingState, ModelLoadsState
from tests.cli.states import healthy, mesh
from tests.cli.views.status.drawing import draw_text

VERBOSE = ViewOptions(verbose=True)
KNOWN = replace(
    healthy("iceland"),
    learned=(LearnedState("qwen2.5:7b", 98.4, 0.2, 3010.0, 4.1, 4), LearnedState("llama3.1:8b", load_s=5.0)),
    decisions=(DecisionState("qwen2.5:7b", 12.0, 1.2, 1.31, "0.06 way + 0.0 wait + 0.3 read 1,100 of 4,200"),),
    loading=LoadingState(60.0, 16.0, 4, (ModelLoadsState("qwen2.5:7b", 3), ModelLoadsState("llama3.1:8b", 1))),
)


def test_what_was_learned_and_forecast_is_shown_when_asked_for() -> None:
    text = draw_text(mesh(KNOWN), 200, VERBOSE)
    rows = [line.split() for line in text.splitlines() if "+20 %" in line]
    assert rows == [["iceland", "qwen2.5:7b", "98", "+20", "%", "3,010", "4.1", "s", "4"]]
    assert "last qwen2.5:7b 12s ago: took 1.31 s, forecast 1.20 s; cost: 0.06 way + 0.0 wait + 0.3 read" in text
    assert "4 loads in the last 1m, 16.0 s in all: qwen2.5:7b 3 times, llama3.1:8b once" in text
    assert "took 1.31 s" not in draw_text(mesh(KNOWN), 200, ViewOptions())


def test_a_node_that_has_answered_nothing_shows_nothing() -> None:
    assert "TOK/S ALONE" not in draw_text(mesh(healthy("iceland")), 200, VERBOSE)


def test_names_of_hosts_are_cleaned() -> None:
    hostile = replace(
        KNOWN,
        learned=(LearnedState("\x1b[31mred\x07"),),
        decisions=(DecisionState("\x1b[2J", 1.0, 1.0, 1.0, "\x1b]0;x\x07"),),
        loading=LoadingState(60.0, 16.0, 4, (ModelLoadsState("\x1b[31m", 3),)),
    )
    text = draw_text(mesh(hostile), 120, VERBOSE)
    assert "\x1b[31m" not in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
