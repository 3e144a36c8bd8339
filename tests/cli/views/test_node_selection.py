from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.cli.views.node_selection import SortKey, ViewSelection, health_rank, select_nodes, sort_nodes
from gpumesh.errors import UsageError
from gpumesh.state import Finding, Health, MeshState, Severity
from tests.cli.states import down, gpu, healthy, mesh, typical


def names(state: MeshState) -> list[str]:
    return [node.name for node in state.nodes]


def labelled() -> MeshState:
    home = replace(healthy("iceland"), labels=(("site", "home"), ("tier", "1")))
    away = replace(healthy("oslo"), labels=(("site", "rented"),))
    return mesh(home, away, healthy("plain"))


def test_all_is_the_state_itself() -> None:
    state = typical()
    assert select_nodes(state) is state
    assert select_nodes(state, ["*"]) is state


def test_names_are_patterns_and_the_order_stays() -> None:
    assert names(select_nodes(typical(), ["runpod", "iceland"])) == ["iceland", "runpod"]
    assert names(select_nodes(typical(), ["*land*", "?ttic"])) == ["iceland", "attic"]


def test_totals_and_findings_are_those_of_the_shown_nodes() -> None:
    pair = Finding("same-gpu", Severity.WARNING, None, "one GPU", nodes=("iceland", "oslo"))
    state = mesh(healthy("iceland"), healthy("oslo"), down("x"), findings=(pair,))
    one = select_nodes(state, ["iceland"])
    assert (one.totals.nodes, one.totals.gpus) == (1, 1)
    assert one.findings == (pair,)
    assert select_nodes(typical(), ["iceland"]).findings == ()


def test_a_name_without_a_node_is_an_error() -> None:
    with pytest.raises(UsageError, match="no node 'icland'") as caught:
        select_nodes(typical(), ["iceland", "icland"])
    assert caught.value.hint == "did you mean iceland? The nodes are: iceland, vengeance, runpod, attic"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["site=home"], ["iceland"]), (["site"], ["iceland", "oslo"]), (["site", "tier=1"], ["iceland"])],
)
def test_labels_must_all_be_there(labels: list[str], expected: list[str]) -> None:
    assert names(select_nodes(labelled(), labels=labels)) == expected


def test_labels_without_a_node_are_an_error() -> None:
    with pytest.raises(UsageError, match=r"no node has site=home and tier=2") as caught:
        select_nodes(labelled(), labels=["site=home", "tier=2"])
    assert caught.value.hint == "the labels are: site=home, site=rented, tier=1"
    with pytest.raises(UsageError) as caught:
        select_nodes(typical(), labels=["site"])
    assert "no node in mesh.yaml has `labels`" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (SortKey.TROUBLE, ["runpod", "vengeance", "iceland", "attic"]),
        (SortKey.CONFIG, ["iceland", "vengeance", "runpod", "attic"]),
        (SortKey.NAME, ["attic", "iceland", "runpod", "vengeance"]),
        (SortKey.HEALTH, ["runpod", "vengeance", "attic", "iceland"]),
        (SortKey.MEMORY, ["vengeance", "iceland", "runpod", "attic"]),
        (SortKey.FREE, ["iceland", "vengeance", "runpod", "attic"]),
        (SortKey.UTIL, ["vengeance", "iceland", "runpod", "attic"]),
        (SortKey.POWER, ["vengeance", "iceland", "runpod", "attic"]),
        (SortKey.TOKENS, ["iceland", "attic", "vengeance", "runpod"]),
        (SortKey.RTT, ["iceland", "vengeance", "attic", "runpod"]),
    ],
)
def test_unknown_figures_come_last_and_equal_ones_keep_their_order(key: SortKey, expected: list[str]) -> None:
    assert names(sort_nodes(typical(), key)) == expected


def test_the_hottest_and_the_busiest_first() -> None:
    hot = replace(healthy("hot"), gpus=(replace(gpu(), temperature_c=80),))
    assert names(sort_nodes(mesh(healthy("cool"), hot), SortKey.TEMP)) == ["hot", "cool"]
    idle = replace(healthy("idle"), load=replace(healthy("idle").load, in_flight=0, queued=0))
    assert names(sort_nodes(mesh(idle, healthy("busy")), SortKey.BUSY)) == ["busy", "idle"]


def test_every_health_has_a_rank() -> None:
    assert sorted(health_rank(replace(healthy("a"), health=health)) for health in Health) == list(range(len(Health)))


def test_a_view_selection_is_applied_to_a_state() -> None:
    wanted = ViewSelection(names=["*e*"], sort=SortKey.NAME)
    assert [node.name for node in wanted.apply(typical()).nodes] == ["iceland", "vengeance"]
    with pytest.raises(UsageError):
        ViewSelection(labels=["x"]).apply(typical())
