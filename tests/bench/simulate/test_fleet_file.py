"""The fleet file: what it says, and what is said about its errors."""

from __future__ import annotations

import math

import pytest

from gpumesh.bench.simulate.fleet import Fault, FaultKind
from gpumesh.bench.simulate.fleet_file import guess_vram_mib, parse_fleet
from gpumesh.errors import ConfigError

FLEET = """\
defaults: {slots: 4, rtt_ms: 20}
nodes:
  - {name: fast, tokens_per_s: 100, models: [Llama3.1:8b], count: 2}
  - name: slow
    tokens_per_s: 50
    slots: 2
    vram_mib: 24564
    models:
      - llama3.1:8b
      - {name: qwen2.5:14b, tokens_per_s: 25, vram_mib: 10500, load_s: 7}
    loaded: [llama3.1:8b]
    faults: [{kind: away, from_s: 60, to_s: 90}, {kind: slow, factor: 2}]
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(text, file="fleet.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_a_fleet() -> None:
    first, second, slow = parse_fleet(FLEET, file="fleet.yaml")
    assert [first.name, second.name, slow.name] == ["fast-1", "fast-2", "slow"]
    model = first.models["llama3.1:8b"]
    assert (model.tokens_per_s, model.prefill_tokens_per_s, model.slots) == (100.0, 2000.0, 4)
    assert first.rtt_s == pytest.approx(0.02)
    qwen = slow.models["qwen2.5:14b"]
    assert (qwen.tokens_per_s, qwen.vram_mib, qwen.load_s, qwen.slots) == (25.0, 10500.0, 7.0, 2)
    assert slow.loaded == ("llama3.1:8b",)
    assert slow.faults == (Fault(FaultKind.AWAY, 60.0, 90.0), Fault(FaultKind.SLOW, 0.0, math.inf, 2.0))


def test_faults_that_are_lies_name_a_factor_or_a_model() -> None:
    [spec] = parse_fleet(
        "nodes: [{tokens_per_s: 5, models: [m], faults: [{kind: miscounting, factor: 0}, {kind: hides, model: m}]}]",
        file="fleet.yaml",
    )
    assert spec.faults == (
        Fault(FaultKind.MISCOUNTING, 0.0, math.inf, 0.0),
        Fault(FaultKind.HIDES, 0.0, math.inf, 1.0, "m:latest"),
    )


def test_all_problems_are_reported_with_line_and_key() -> None:
    text = """\
nodes:
  - {name: a, token_per_s: 100, models: [m]}
  - {name: b, tokens_per_s: fast, slots: 1.5, models: m, loaded: [other]}
  - name: a
    tokens_per_s: 1
    models: [m]
    faults:
      - {kind: gone, to_s: 5}
"""
    assert problems_of(text) == [
        "fleet.yaml:2:15: nodes[0].token_per_s: unknown key; did you mean tokens_per_s?",
        "fleet.yaml:2:5: nodes[0].tokens_per_s: is missing: how fast an answer is generated",
        "fleet.yaml:3:29: nodes[1].tokens_per_s: 'fast' is not a number from 0.01 to 1e+06",
        "fleet.yaml:3:42: nodes[1].slots: '1.5' is not a whole number from 1 to 4096",
        "fleet.yaml:3:47: nodes[1].models: must be a list",
        "fleet.yaml:8:16: nodes[2].faults[0].kind: 'gone' is not one of "
        "away, slow, lying, busy, shifting, miscounting, random-counts, no-counts, lists-missing, hides",
        "fleet.yaml:4:5: nodes[2]: 'a' is a name of nodes[0] already",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "fleet.yaml: a fleet file has a list `nodes`"),
        ("[]", "fleet.yaml:1:1: a fleet file has a list `nodes`"),
        ("nodes: []", "fleet.yaml:1:1: nodes: names no node"),
        ("nodes: [5]", "nodes[0]: must be keys with values"),
        ("nodes: [{tokens_per_s: 5}]", "nodes[0].models: is missing"),
        ("nodes: [{tokens_per_s: nan, models: [m]}]", "'nan' is not a number"),
        ("nodes: [{tokens_per_s: 5, models: [m], loaded: [n]}]", "'n:latest' is none of the node's models"),
        ("nodes: [{tokens_per_s: 5, models: [m], count: 20000}]", "not a whole number from 1 to 10000"),
        ("nodes: [{tokens_per_s: 5, models: [m], faults: [{kind: away, from_s: 5, to_s: 1}]}]", "is before from_s"),
        ("nodes: [{tokens_per_s: 5, models: [m], faults: [{kind: slow, factor: 0}]}]", "must be at least 0.001"),
        ("nodes:\n\t- a", "a tab indents this line"),
    ],
)
def test_problems(text: str, problem: str) -> None:
    assert problem in problems_of(text)[0]


@pytest.mark.parametrize(
    ("name", "mib"), [("llama3.1:8b", 5960), ("qwen2.5:0.5b", 1310), ("phi", 6000), ("8bit", 6000)]
)
def test_memory_by_name(name: str, mib: float) -> None:
    assert guess_vram_mib(name) == pytest.approx(mib)
