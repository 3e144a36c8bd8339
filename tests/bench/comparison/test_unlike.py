"""Different things are not compared, and each reason is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.bench.comparison.unlike import find_unlike
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from tests.bench.example_results import MODEL, make_stage_run, record, result, stage, summarize_only

PLAIN = result(summarize_only(make_stage_run(record())))
(NODE,) = PLAIN.environment.nodes


def on_nodes(*nodes: object) -> BenchResult:
    return replace(PLAIN, environment=replace(PLAIN.environment, nodes=nodes))  # type: ignore[arg-type]


def test_equal_things_may_be_compared() -> None:
    assert list(find_unlike(PLAIN, PLAIN)) == []
    more = replace(PLAIN, settings=replace(PLAIN.settings, requests=100))
    assert list(find_unlike(PLAIN, more)) == [], "more requests only make a figure surer"
    assert list(find_unlike(PLAIN, on_nodes(replace(NODE, rtt_ms=1.0)))) == [], "measured values may differ"


def test_all_reasons_are_named() -> None:
    other = replace(
        PLAIN,
        scenario=Scenario.SCALE,
        settings=BenchSettings("llama3", concurrency=(4,), tokens=128, prompt_tokens=99, think=None, seed=2, speed=2.0),
        objective=Objective(500.0, 50.0),
    )
    assert list(find_unlike(PLAIN, other)) == [
        "the scenarios differ: quick and scale",
        f"not the same model: {MODEL} and llama3",
        "not the same concurrency: 1, 2 and 4",
        "not the same tokens: 64 and 128",
        "not the same prompt tokens: 32 and 99",
        "not the same think: False and none",
        "not the same seed: 1 and 2",
        "not the same speed: 1.0 and 2.0",
        "not the same SLO: TTFT 2000 ms, TPOT 200 ms and TTFT 500 ms, TPOT 50 ms",
    ]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("gpus", ("NVIDIA H100",), "GPUs: NVIDIA GeForce RTX 4090 and NVIDIA H100"),
        ("driver", "560.1", "driver: 550.54.15 and 560.1"),
        ("backend", "vllm", "server: ollama and vllm"),
        ("version", "0.13.0", "server version: 0.12.6 and 0.13.0"),
        ("transport", "openssh", "transport: sshtunnel and openssh"),
        ("parallel", 4, "parallel requests: 1 and 4"),
    ],
)
def test_a_changed_node_is_named_with_what_changed(name: str, value: object, reason: str) -> None:
    changed = replace(NODE, **{name: value})  # type: ignore[arg-type]
    assert list(find_unlike(PLAIN, on_nodes(changed))) == [f"node iceland: not the same {reason}"]
    unknown = replace(NODE, **{name: None})  # type: ignore[arg-type]
    assert list(find_unlike(PLAIN, on_nodes(unknown))) == [], "what is unknown may be the same"


def test_nodes_that_only_one_has() -> None:
    both = on_nodes(NODE, replace(NODE, name="norway"))
    assert list(find_unlike(PLAIN, both)) == ["node norway is only in B"]
    assert list(find_unlike(both, PLAIN)) == ["node norway is only in A"]


def test_changed_nodes_are_named_in_the_order_of_the_file() -> None:
    names = [f"node-{number}" for number in range(9, 0, -1)]
    before = on_nodes(*(replace(NODE, name=name) for name in names))
    after = on_nodes(*(replace(NODE, name=name, gpus=("NVIDIA H100",)) for name in names))
    assert [reason.split()[1].rstrip(":") for reason in find_unlike(before, after)] == names


def test_simulated_hosts_are_not_compared_with_real_ones() -> None:
    (reason,) = find_unlike(PLAIN, on_nodes(replace(NODE, simulated=True)))
    assert reason == "one of the two was measured on simulated hosts: B"


def test_stages_of_the_same_name_with_another_load() -> None:
    a, b = (
        result(summarize_only(make_stage_run(record(), of=stage("alpha", concurrency=level)))) for level in (4, None)
    )
    assert list(find_unlike(a, b)) == ["stage alpha: not the same concurrency: 4 and none"]


def test_what_a_host_says_is_printed_safely() -> None:
    (reason,) = find_unlike(PLAIN, on_nodes(replace(NODE, version="0.1\x1b[31m")))
    assert "\x1b" not in reason
