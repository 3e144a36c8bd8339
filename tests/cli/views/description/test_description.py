from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.cli.views.description.description import print_description
from gpumesh.cli.views.description.facts import MAX_SHOWN_MODELS, list_sections
from gpumesh.cli.views.node_selection import select_nodes
from gpumesh.state import NodeState
from tests.cli.states import AT, down, healthy, mesh, typical


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("node", typical().nodes, ids=lambda node: node.name)
def test_each_state_at_each_width(node: NodeState, columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_description(select_nodes(typical(), [node.name]), f"name: {node.name}\n")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0].split()[1:3] == [node.name, str(node.health)]
    assert lines[-1] == f"  name: {node.name}"


def test_what_is_not_known_is_left_out() -> None:
    titles = [section.title for section in list_sections(down("attic"), AT)]
    assert "Host" not in titles
    assert "Models" not in titles


def test_a_pool_has_its_members() -> None:
    sections = list_sections(replace(healthy("big"), pool_members=("iceland", "vengeance")), AT)
    (host,) = [section for section in sections if section.title == "Host"]
    assert ("pool of", "iceland, vengeance") in host.facts


def test_many_models_are_counted(capsys: Any) -> None:
    node = healthy("iceland")
    names = tuple(f"model-{number}" for number in range(MAX_SHOWN_MODELS + 7))
    node = replace(node, backend=replace(node.backend, models=names, catalog=()))
    print_description(mesh(node), None)
    shown = capsys.readouterr().out
    assert "and 7 more" in shown
    assert names[-1] not in shown
