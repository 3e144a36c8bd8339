"""Which first word of a prompt is a model, and which model was meant by a word that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.cli.fleet_models import FleetModels, may_be_model
from gpumesh.state import NodeState
from gpumesh.topology import Topology
from tests.cli.states import down, healthy, mesh

TOPOLOGY = """
version: 1
name: home
models:
  qwen2.5:7b: {aliases: [gpt-4o-mini]}
  mistral: {fallback: qwen2.5:7b}
nodes:
  - {name: iceland, backend: {url: http://127.0.0.1:1}}
  - {name: attic, enabled: false, expect: {models: [switched-off]}, backend: {url: http://127.0.0.1:2}}
"""


def topology() -> Topology:
    return config.parse(TOPOLOGY, file="mesh.yaml", env={}, home=Path("/"), source=None)


def with_models(node: NodeState, *names: str) -> NodeState:
    return replace(node, backend=replace(node.backend, models=names))


def fleet(*names: str) -> FleetModels:
    return FleetModels.of(mesh(with_models(healthy("iceland"), *names)), topology())


USUAL = ("qwen2.5:7b", "llama3.2:latest", "deepseek-r1:70b", "phi:latest", "nomic-embed-text:latest")


@pytest.mark.parametrize(
    ("word", "model"),
    [
        ("llama3.2", "llama3.2:latest"),
        ("llama3.2:latest", "llama3.2:latest"),
        ("LLAMA3.2", "llama3.2:latest"),
        ("library/llama3.2", "llama3.2:latest"),
        ("qwen2.5:7b", "qwen2.5:7b"),
        ("gpt-4o-mini", "gpt-4o-mini"),
        ("nomic-embed-text", "nomic-embed-text:latest"),
        ("mistral", "mistral"),
        ("qwen2.5", None),
        ("Why", None),
        ("switched-off", None),
    ],
)
def test_a_word_names_a_model_by_ollamas_rule(word: str, model: str | None) -> None:
    assert fleet(*USUAL).find(word) == model


@pytest.mark.parametrize(
    ("word", "guess"),
    [
        ("qwen2.5", "qwen2.5:7b"),
        ("qwen2.5:14b", "qwen2.5:7b"),
        ("lama3.2", "llama3.2:latest"),
        ("deepseek-r2", "deepseek-r1:70b"),
        ("llama3.3:70b", "llama3.2:latest"),
        ("hf.co/someone/model-GGUF:Q4_K_M", None),
        ("something:7b", None),
    ],
)
def test_a_word_that_looks_like_a_model_and_is_none(word: str, guess: str | None) -> None:
    models = fleet(*USUAL)
    assert models.find(word) is None
    assert models.looks_like_model(word)
    assert models.guess(word) == guess
    hint = models.missing_error(word).hint or ""
    assert hint.startswith("there are: " if guess is None else f"did you mean {guess}? there are: ")


@pytest.mark.parametrize(
    "word",
    ["Why", "12:30", "Note:", "http://host/x", "3", "42nd", "C:", "a/b", "python3", "Zürich", "wie", "?:b", "R2D2"],
)
def test_ordinary_words_are_words(word: str) -> None:
    assert not fleet(*USUAL).looks_like_model(word)


@pytest.mark.parametrize("word", ["", "Why is", "two\nlines", "-", "-x"])
def test_what_cannot_be_a_model(word: str) -> None:
    assert not may_be_model(word)


def test_a_model_is_missing_only_where_that_is_known() -> None:
    assert fleet(*USUAL).is_missing("gemma")
    assert not fleet(*USUAL).is_missing("llama3.2")
    assert not fleet(*USUAL).is_missing("mistral"), "its fallback is there"
    assert not fleet("gpt-4o-mini:latest").is_missing("qwen2.5:7b"), "a server lists it under its alias"
    assert not fleet().is_missing("gemma"), "a server that lists nothing may have it"
    nobody = FleetModels.of(mesh(down("iceland")), topology())
    assert not nobody.is_missing("gemma"), "nobody could be asked"
    some = FleetModels.of(mesh(with_models(healthy("iceland"), "a"), with_models(down("attic"), "b")), topology())
    assert some.is_missing("b"), "the node that has it is away"
    assert some.find("b") == "b:latest" or some.find("b") == "b"
