from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gpumesh.errors import NoNodeError, UsageError
from gpumesh.mesh.models import inventory
from gpumesh.state import BackendPhase, BackendState, LoadedModel, MeshState, ModelInfo, NodeState
from tests.cli.states import AT, down, healthy, mesh


def node(name: str, *catalog: ModelInfo, loaded: tuple[LoadedModel, ...] = (), kind: str = "ollama") -> NodeState:
    backend = BackendState(
        kind, BackendPhase.UP, models=tuple(info.name for info in catalog), loaded=loaded, catalog=catalog
    )
    return replace(healthy(name), backend=backend)


QWEN = ModelInfo("qwen2.5:7b", "sha256:" + "a" * 64, 4466, None, "7.6B", "Q4_K_M", "qwen2")
OLDER = replace(QWEN, digest="b" * 64, size_mib=4400)
EMBED = ModelInfo("nomic-embed-text:latest", "c" * 64, 262, None, "137M", "F16", "nomic-bert")


def state() -> MeshState:
    loaded = LoadedModel("qwen2.5:7b", 5280, 5280, AT + timedelta(minutes=4), 8192)
    return mesh(
        node("a", QWEN, EMBED, loaded=(loaded,)),
        node("b", OLDER),
        node("c", QWEN),
        node("vllm", ModelInfo("qwen2.5:7b"), kind="openai"),
        down("off"),
    )


def test_a_row_for_each_digest_of_a_name() -> None:
    rows = inventory.list_model_rows(state())
    assert [(row.name, row.nodes, row.copies) for row in rows] == [
        ("nomic-embed-text:latest", ("a",), 1),
        ("qwen2.5:7b", ("a", "c"), 2),
        ("qwen2.5:7b", ("b",), 2),
        ("qwen2.5:7b", ("vllm",), 2),
    ]
    assert (rows[1].size_mib, rows[1].quantization, rows[2].size_mib) == (4466, "Q4_K_M", 4400)
    assert rows[1].loaded == (inventory.LoadedCopy("a", 5280, 240.0, 8192),)
    assert inventory.shorten_digest(rows[1].digest) == "a" * 12
    assert inventory.shorten_digest(None) is None


def test_context_lengths_are_those_of_any_node_that_said() -> None:
    rows = inventory.add_context_lengths(inventory.list_model_rows(state()), {("c", "qwen2.5:7b"): 32768})
    assert [row.context_length for row in rows] == [None, 32768, None, None]


def test_chosen_nodes() -> None:
    def chosen(names: list[str], *, everywhere: bool = False, holding: str | None = None) -> list[str]:
        return [
            each.name for each in inventory.choose_nodes(state(), names, everywhere=everywhere, required_model=holding)
        ]

    assert chosen(["c", "a", "c"]) == ["c", "a"]
    assert chosen([], everywhere=True) == ["a", "b", "c"]
    assert chosen([], holding="nomic-embed-text") == ["a"]
    assert chosen([], everywhere=True, holding="QWEN2.5:7b") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "holding", "error", "said"),
    [
        (["x"], None, UsageError, "no node 'x'"),
        (["off"], None, NoNodeError, "off: no Ollama server"),
        (["vllm"], None, NoNodeError, "vllm: no Ollama server"),
        (["b"], "nomic-embed-text", UsageError, "b has no model"),
        ([], None, UsageError, "on which node"),
        ([], "phi4", NoNodeError, "no Ollama node that is up has 'phi4'"),
    ],
)
def test_a_choice_that_is_not_clear_is_refused(
    names: list[str], holding: str | None, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        inventory.choose_nodes(state(), names, everywhere=False, required_model=holding)


def test_without_a_model_store_no_node_is_chosen() -> None:
    with pytest.raises(NoNodeError, match="no Ollama node is up"):
        inventory.choose_nodes(mesh(down("a")), [], everywhere=True, required_model=None)


def test_sync_pulls_models_that_others_lack_or_have_with_another_digest() -> None:
    def plan(source: str, *models: str, names: tuple[str, ...] = ()) -> list[tuple[str, str]]:
        return [(task.node.name, task.model) for task in inventory.plan_sync(state(), source, names, models)]

    assert plan("a") == [
        ("b", "qwen2.5:7b"),
        ("b", "nomic-embed-text:latest"),
        ("c", "nomic-embed-text:latest"),
    ]
    assert plan("a", "qwen2.5:7b") == [("b", "qwen2.5:7b")]
    assert plan("a", "nomic-embed-text", names=("c",)) == [("c", "nomic-embed-text:latest")]
    assert plan("c", names=("a",)) == []
    with pytest.raises(UsageError, match="b has no model"):
        plan("b", "nomic-embed-text")


def test_embedders_are_recognised_by_family_or_name() -> None:
    assert inventory.is_embedder_on(node("a", EMBED), "nomic-embed-text")
    assert inventory.is_embedder_on(node("a", replace(QWEN, family="bert")), "qwen2.5:7b")
    assert not inventory.is_embedder_on(node("a", QWEN), "qwen2.5:7b")
