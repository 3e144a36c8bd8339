"""What keys mean: pure, without a terminal."""

from __future__ import annotations

import pytest

from gpumesh.cli.views.live.key_selection import KeySelection
from gpumesh.cli.views.node_selection import SortKey, ViewSelection

NODES = ["a", "b", "c"]


def pressed(*keys: str, nodes: list[str] | None = None) -> KeySelection:
    choice = KeySelection(ViewSelection(), nodes=NODES if nodes is None else nodes)
    for key in keys:
        choice.handle_key(key)
    return choice


@pytest.mark.parametrize(
    ("keys", "selected"),
    [
        (["down"], "a"),
        (["up"], "c"),
        (["j", "j"], "b"),
        (["down", "down", "down", "down"], "c"),
        (["end", "k"], "b"),
        (["end", "home"], "a"),
        (["page down"], "a"),
        (["home", "page down"], "c"),
        (["end", "page up"], "a"),
        (["down", "escape"], ""),
        (["x", "?"], ""),
    ],
)
def test_keys_select_a_node(keys: list[str], selected: str) -> None:
    assert pressed(*keys).selected == selected


def test_a_node_that_is_gone_is_not_selected() -> None:
    choice = pressed("down")
    choice.nodes = ["x", "y"]
    choice.handle_key("down")
    assert choice.selected == "x"
    assert pressed("down", nodes=[]).selected == ""


def test_keys_give_actions() -> None:
    choice = pressed("down")
    assert [choice.handle_key(key) for key in "drcqQ"] == ["drain", "resume", "reconnect", "quit", "quit"]
    assert choice.handle_key("z") is None


def test_an_action_needs_a_selected_node_unless_there_is_only_one() -> None:
    choice = pressed()
    assert choice.handle_key("d") is None
    assert "choose a node" in choice.note
    alone = pressed(nodes=["only"])
    assert alone.handle_key("d") == "drain"
    assert alone.selected == "only"


def test_keys_change_sort_order_and_verbosity() -> None:
    choice = pressed(*["s"] * len(SortKey), "v")
    assert choice.view == ViewSelection(sort=SortKey.TROUBLE, verbose=True)
    choice.handle_key("s")
    assert choice.view == ViewSelection(sort=SortKey.CONFIG, verbose=True)
    assert choice.note == "sorted by config"


def test_q_asks_first_where_it_ends_more_than_the_view() -> None:
    choice = KeySelection(ViewSelection(), nodes=NODES, quit_question="stop the mesh? y/n")
    for key in ("n", "q", "escape", "x"):
        assert (choice.handle_key("q"), choice.asks) == (None, True)
        assert (choice.handle_key(key), choice.asks) == (None, False), key
    choice.handle_key("Q")
    assert choice.handle_key("y") == "quit"
    assert choice.handle_key("y") is None, "without the question it means nothing"
