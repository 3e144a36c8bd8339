from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.balancer.select import meets_demand, no_node_error
from gpumesh.topology import BackendKind, ModelSpec

LLAMA = ModelSpec("llama3.1:8b", aliases=("meta-llama/Llama-3.1-8B-Instruct", "llama-8b.gguf"), prefer=("a",))
LARGE = ModelSpec("llama3.3:70b", nodes=("a", "b"), fallback="llama-8b.gguf")
SMALL = ModelSpec("qwen2.5", fallback="llama3.3:70b", context_steps=(4096, 16384))
RULES = ModelRules((LLAMA, LARGE, SMALL))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3.1:8b", "llama3.1:8b"),
        ("META-LLAMA/Llama-3.1-8B-Instruct", "llama3.1:8b"),
        ("llama-8b.gguf:latest", "llama3.1:8b"),
        ("Qwen2.5:latest", "qwen2.5"),
        ("Other", "Other"),
    ],
)
def test_the_name_in_the_mesh(name: str, expected: str) -> None:
    assert RULES.name_in_mesh(name) == expected
    assert ModelRules().name_in_mesh(name) == name


def test_a_demand_gets_the_nodes_of_its_model() -> None:
    assert RULES.apply(Demand("llama-8b.gguf")) == Demand("llama3.1:8b", preferred_nodes=frozenset({"a"}))
    assert RULES.apply(Demand("llama3.3:70b")).nodes == frozenset({"a", "b"})
    assert RULES.apply(Demand("llama3.3:70b", nodes=frozenset({"b", "c"}))).nodes == frozenset({"b"})
    for demand in (Demand(None), Demand("other")):
        assert RULES.apply(demand) is demand


@given(st.sampled_from(["llama-8b.gguf", "llama3.3:70b", "qwen2.5", "x"]), st.none() | st.frozensets(st.text("abc")))
def test_to_apply_the_rules_twice_changes_nothing(model: str, nodes: frozenset[str] | None) -> None:
    once = RULES.apply(Demand(model, nodes=nodes))
    assert RULES.apply(once) == once


def test_fallbacks_follow_each_other_and_end() -> None:
    assert RULES.fallbacks("qwen2.5:latest") == ["llama3.3:70b", "llama3.1:8b"]
    assert RULES.fallbacks("llama3.1:8b") == []
    assert RULES.fallbacks("other") == []
    assert RULES.fallbacks(None) == []
    circle = ModelRules((ModelSpec("a", fallback="b"), ModelSpec("b", fallback="c"), ModelSpec("c", fallback="b")))
    assert circle.fallbacks("a") == ["b", "c"]


def test_each_server_gets_the_name_that_it_lists() -> None:
    assert RULES.server_names(["Llama-8B.gguf"]) == {"llama3.1:8b": "Llama-8B.gguf"}
    assert RULES.server_names(["llama-8b.gguf", "llama3.1:8b"]) == {"llama3.1:8b": "llama3.1:8b"}
    assert RULES.server_names(["qwen2.5", "other"]) == {}


@pytest.mark.parametrize(
    ("asked", "given"), [(1, 4096), (4096, 4096), (4097, 16384), (16384, 16384), (16385, 16385), (131072, 131072)]
)
def test_a_context_is_rounded_up(asked: int, given: int) -> None:
    assert RULES.round_context("QWEN2.5", asked) == given
    assert RULES.round_context("other", asked) == asked


def candidate(name: str, *, usable: bool = True) -> Candidate:
    return Candidate(name, BackendKind.OLLAMA, usable, frozenset({"m"}))


def test_only_the_allowed_nodes_are_selected() -> None:
    nodes = [candidate("a"), candidate("b")]
    demand = Demand("m", nodes=frozenset({"b"}))
    assert [node.name for node in nodes if meets_demand(node, demand)] == ["b"]


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        (Demand("m", nodes=frozenset()), "leave no node for 'm'"),
        (Demand("m", node="a", nodes=frozenset({"b"})), "keep 'm' away from node 'a'"),
        (Demand("m", nodes=frozenset({"c"})), "none of the nodes that may serve this (c) is usable now"),
    ],
)
def test_why_the_rules_leave_no_node(demand: Demand, said: str) -> None:
    error = no_node_error([candidate("a"), candidate("b"), candidate("c", usable=False)], demand)
    assert said in error.message
