from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.errors import NoNodeError, UsageError
from gpumesh.mesh.models.default_model import chat_models, choose_model, is_embedding_model
from gpumesh.state import Health, ModelInfo, NodeState
from tests.cli.states import down, healthy, mesh


def node(name: str, *models: str, family: str | None = None) -> NodeState:
    catalog = tuple(ModelInfo(model, family=family) for model in models)
    return replace(healthy(name), backend=replace(healthy(name).backend, models=models, catalog=catalog))


@pytest.mark.parametrize(
    ("name", "family", "embeds"),
    [
        ("nomic-embed-text:latest", None, True),
        ("all-minilm:latest", "bert", True),
        ("snowflake-arctic-embed:l", None, True),
        ("mxbai:latest", "BERT", True),
        ("qwen2.5:7b", "qwen2", False),
        ("m", None, False),
    ],
)
def test_models_that_only_embed(name: str, family: str | None, embeds: bool) -> None:
    assert is_embedding_model(name, family) is embeds


def test_models_of_nodes_that_are_up_each_once() -> None:
    state = mesh(
        node("a", "x", "nomic-embed-text"),
        replace(node("b", "y", "x"), health=Health.DEGRADED),
        replace(node("c", "z"), health=Health.DRAINING),
        down("d"),
    )
    assert chat_models(state) == ("x", "y")
    assert chat_models(state, "b") == ("y", "x")
    assert chat_models(state, "d") == ()


def test_the_only_model_is_chosen() -> None:
    assert choose_model(mesh(node("a", "x", "nomic-embed-text"), node("b", "x"))) == "x"
    with pytest.raises(UsageError, match="which model") as caught:
        choose_model(mesh(node("a", "x", "y")))
    assert "x, y" in caught.value.message
    with pytest.raises(NoNodeError, match="has a model to chat with"):
        choose_model(mesh(node("a", "nomic-embed-text")))
