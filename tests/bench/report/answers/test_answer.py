"""The answer in sentences: what it says, and that it is silent about what is not known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.bench.figures.capacity import NodeCapacity
from gpumesh.bench.figures.cost import StageCost
from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.outages.failover import FailoverFigures
from gpumesh.bench.figures.scaling import NodeLoss, Scaling
from gpumesh.bench.figures.summary import FailureCount, StageResult, summarize_stage
from gpumesh.bench.load.conditions import Limit, LoadConditions, ProcessLoad, Via
from gpumesh.bench.report.answers.answer import answer_parts, partial_sentence, short_answer
from gpumesh.bench.results.result import BenchResult, NodeEnvironment
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind
from gpumesh.mesh.outages.outage import OutageKind
from tests.bench.example_results import make_stage_run, record, result, stage, summarize_only

RTX_4090, RTX_3090 = "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090"


def node(name: str, *, gpus: tuple[str, ...] | None = (RTX_4090,), **changes: Any) -> NodeEnvironment:
    made = NodeEnvironment(name, "sshtunnel", 41.2, "ollama", "0.12.6", gpus, "550", 2, simulated=False)
    return replace(made, **changes)


def measured(
    name: str = "mesh", *, tokens_per_s: float | None = 100.0, good_share: float = 1.0, **changes: Any
) -> StageResult:
    made = summarize_only(make_stage_run(*(record(number) for number in range(12)), of=stage(name)))
    rates = replace(made.rates, loaded_tokens_per_s=tokens_per_s, good_share=good_share)
    return replace(made, rates=rates, **changes)


def alone(name: str, tokens_per_s: float, **changes: Any) -> StageResult:
    return measured(name, tokens_per_s=tokens_per_s, kind=StageKind.NODE, node=name, concurrency=2, **changes)


def answer(made: BenchResult) -> dict[str, str]:
    return {part.topic: part.text for part in answer_parts(made)}


TWO = (node("iceland"), node("moon", gpus=(RTX_3090,)))
WITHIN = "TTFT ≤ 2,000 ms and TPOT ≤ 200 ms"


def test_capacity_of_the_mesh_and_of_each_node() -> None:
    stages = [alone("iceland", 73.0), alone("moon", 41.0), measured(tokens_per_s=111.0, concurrency=4)]
    assert answer(result(*stages, nodes=TWO))["Capacity"] == (
        "The mesh of 2 nodes gives 111 output tokens/s with 4 requests in flight. Alone, iceland gives 73.0 tokens/s "
        "with 2 requests in flight. moon gives 41.0 tokens/s with 2 requests in flight."
    )
    capacity = (NodeCapacity("iceland", 4, 150.0, "more gave no more"), NodeCapacity("moon", 1, None, "x"))
    assert answer(result(*stages, nodes=TWO, capacity=capacity))["Capacity"].endswith(
        "Alone, iceland gives 150 tokens/s with 4 requests at once (more gave no more). moon gives – tokens/s with"  # noqa: RUF001
        " 1 request at once (x)."
    )


def test_of_many_nodes_only_some_are_named() -> None:
    names = [f"n{number}" for number in range(9)]
    made = result(*(alone(name, 50.0) for name in names), nodes=tuple(map(node, names)))
    assert answer(made)["Capacity"].endswith(
        "n5 gives 50.0 tokens/s with 2 requests in flight. 3 more nodes are in the tables."
    )


def test_a_single_node_is_named_once() -> None:
    made = result(measured(concurrency=1), nodes=(node("iceland"), node("away", measured=False)))
    assert answer(made)["Capacity"] == "iceland gives 100 output tokens/s with 1 request in flight."
    assert "Slowest node" not in answer(made)


def test_an_open_loop_served_what_came() -> None:
    replay = replace(measured("replay", tokens_per_s=None), concurrency=None, kind=StageKind.TRACE)
    replay = replace(
        replay, rates=replace(replay.rates, requests_per_s=3.5, output_tokens_per_s=70.0, goodput_per_s=3.4)
    )
    told = answer(result(replay, nodes=TWO, scenario=Scenario.REPLAY))
    assert told["Capacity"] == "The mesh of 2 nodes served 12 of 12 requests: 3.50 requests/s and 70.0 output tokens/s."
    assert told["Users"] == f"With this load, all of the requests met {WITHIN}: 3.40 good requests/s."


def test_the_knee() -> None:
    stages = [
        measured(f"c={level}", tokens_per_s=rate, concurrency=level)
        for level, rate in ((1, 50.0), (4, 200.0), (8, 201.0))
    ]
    knee = find_knee(stages, Objective())
    assert knee is not None
    assert answer(result(*stages, scenario=Scenario.SWEEP, knee=knee))["Knee"] == (
        f"{knee.text}. At the knee: {knee.goodput_text}."
    )


def server(tokens_per_s: float) -> Any:
    return replace(measured().rates.server, n=12, p50=tokens_per_s)


def with_server(made: StageResult, tokens_per_s: float) -> StageResult:
    return replace(made, rates=replace(made.rates, server=server(tokens_per_s)))


SLOW, FAST = with_server(alone("moon", 41.0), 20.0), with_server(alone("iceland", 73.0), 37.0)


@pytest.mark.parametrize(
    ("slow", "environment", "reason"),
    [
        (SLOW, TWO[1], f"its GPU is {RTX_3090}, the other's is {RTX_4090}"),
        (SLOW, node("moon"), "its server gives each answer 20.0 tokens/s, the other's 37.0"),
        (SLOW, node("moon", gpus=None), "its server gives each answer 20.0 tokens/s, the other's 37.0"),
        (SLOW, node("moon", gpus=()), "it has no GPU"),
        (replace(SLOW, failed=3), node("moon"), "3 of its 12 requests failed"),
        (replace(with_server(SLOW, 37.0), concurrency=1), node("moon"), "it answers 1 request at once, the other 2"),
        (with_server(SLOW, 37.0), node("moon"), "the reason is in none of the figures"),
    ],
)
def test_the_slowest_node_and_why(slow: StageResult, environment: NodeEnvironment, reason: str) -> None:
    told = answer(result(FAST, slow, nodes=(TWO[0], environment)))
    assert told["Slowest node"] == f"moon gives 41.0 tokens/s alone, iceland 73.0: {reason}."


def test_nodes_that_are_equally_fast() -> None:
    told = answer(result(alone("iceland", 73.0), alone("moon", 70.0), nodes=TWO))
    assert told["Slowest node"] == "None: all nodes are about equally fast (70.0 to 73.0 tokens/s alone)."


def test_without_stages_of_nodes_their_answers_in_the_mesh_tell() -> None:
    shares = [record(number, node="iceland", server_ms=150.0) for number in range(6)]
    shares += [record(number, node="moon", gap_ms=40.0, server_ms=500.0) for number in range(6, 12)]
    told = answer(result(summarize_only(make_stage_run(*shares)), nodes=TWO))
    assert told["Slowest node"].startswith("moon gives 27.5 tokens/s for each answer, iceland 110: its GPU is")


def test_scaling_and_where_the_loss_went() -> None:
    losses = (
        NodeLoss("iceland", 73.0, 60.0, 2.0, 1.7, 10.0, 0.0, 3.0),
        NodeLoss("moon", 41.0, 40.0, 2.0, 2.0, 0.5, 0.0, 0.5),
    )
    scaling = Scaling(100.0, 114.0, 100 / 114, losses=losses, tail_share=0.12, explanation="moon was swapped")
    assert answer(result(measured(), nodes=TWO, scaling=scaling))["Scaling"] == (
        "The mesh gives 88% of what its nodes give alone (100 of 114 tokens/s): moon was swapped. Lost, in tokens/s: "
        "10.5 by slots that had no request, 3.50 because each answer was slower than alone. A batch of just these "
        "requests loses 12% more by its ramp and its tail, while not all slots are busy."
    )
    whole = Scaling(113.0, 114.0, 113 / 114, losses=losses[1:], tail_share=0.01)
    assert answer(result(measured(), nodes=TWO, scaling=whole))["Scaling"] == (
        "The mesh gives 99% of what its nodes give alone (113 of 114 tokens/s)."
    )


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({1: 1.0, 4: 0.99, 8: 0.4}, f"4 users at a time: 99% of the requests met {WITHIN}; with 8, only 40%."),
        ({1: 1.0, 4: 1.0}, f"4 users at a time: all of the requests met {WITHIN}; more were not measured."),
        ({1: 0.999}, f"1 user at a time: 99% of the requests met {WITHIN}; more were not measured."),
        ({2: 0.5}, f"No measured load was served within {WITHIN}: 50% of the requests of 2 users."),
        ({1: 0.5, 2: 1.0}, f"No measured load was served within {WITHIN}: 50% of the requests of 1 user."),
    ],
)
def test_how_many_users_are_served_within_the_objectives(shares: dict[int, float], sentence: str) -> None:
    stages = [measured(f"c={level}", concurrency=level, good_share=share) for level, share in shares.items()]
    assert answer(result(*stages, scenario=Scenario.SWEEP))["Users"] == sentence


def test_the_cost_at_the_load_at_which_tokens_are_cheapest() -> None:
    stages = [measured("c=1", tokens_per_joule=0.3), measured("c=8", tokens_per_joule=0.5), measured("c=9")]
    costs = (StageCost("c=1", 1.1, 0.3), StageCost("c=8", 0.4, 0.172), StageCost("c=9", 0.1, None))
    told = answer(result(*stages, costs=costs))
    assert told["Cost"] == (
        "A million output tokens cost EUR 0.57 at this load (c=8: rent 0.40; energy of the GPUs 0.17; 0.500 tokens per "
        "joule)."
    ), "a cost of which a part is unknown is not the lowest"
    assert answer(result(*stages))["Cost"] == "The GPUs give 0.500 output tokens per joule (c=8)."
    assert "Cost" not in answer(result(measured()))
    rent_unknown = answer(result(*stages, costs=(StageCost("c=8", None, 0.004),)))["Cost"]
    assert "cost EUR 0.004 at this load (c=8: rent unknown; energy" in rent_unknown


def test_a_stage_that_the_machine_limited_is_told() -> None:
    busy = LoadConditions(Via.MESH, own_process=False, generator=ProcessLoad(0.9), limit=Limit.MACHINE_BUSY)
    stages = [measured(f"c={level}", conditions=busy if level > 1 else None) for level in range(1, 10)]
    assert answer(result(*stages))["Caution"] == (
        "MACHINE-BUSY in c=2, c=3, c=4, c=5, c=6, c=7, 2 more: these figures may not be those of the servers. The "
        "notes say why."
    )
    assert "Caution" not in answer(result(measured()))


def test_failures_and_their_most_frequent_reason() -> None:
    failures = (FailureCount("x", "no answer", 2), FailureCount("y", "cut", 1))
    told = answer(result(measured(failed=2, cut=1, failures=failures)))
    assert told["Failures"] == "3 of 12 requests failed. Most often: no answer."
    assert "Failures" not in answer(result(measured()))


def test_failover_tells_what_clients_noticed() -> None:
    disturbed = summarize_only(
        make_stage_run(record(), record(1, sent_s=1.0), disturbed_s=(0.5, 1.0), disturbance="iceland drained")
    )
    made = result(disturbed, scenario=Scenario.FAILOVER)
    (part,) = answer_parts(made)
    assert part.text == "iceland drained under load: none of 2 requests failed."
    figures = FailoverFigures(
        "iceland", OutageKind.TUNNEL, 0.5, 1.0, 210.0, "down", 1.0, 2.0, 820.0, 31.0, 50.0, 2, 3, 0, 0,
        tokens_repeated=0, tokens_lost=4, serves_ms=900.0,
    )  # fmt: skip
    made = replace(made, failover=figures)
    (part,) = answer_parts(made)
    clients = (
        "iceland drained under load: none of 2 requests failed, 2 were sent again to another node, 3 answers were "
        "continued by another node. The longest pause in an answer was 820 ms (31.0 ms before)."
    )
    assert part.text == (
        f"{clients} The mesh noticed after 210 ms. Of the tokens of continued answers, none came twice and 4 are "
        "missing. The node served again 900 ms after it was put back."
    )
    assert short_answer(made) == [clients], "the terminal has lines for the rest"


def test_overhead_tells_what_each_part_adds() -> None:
    of = stage("iceland", count=4, kind=StageKind.NODE, node="iceland")
    routes = [
        record(number, stage="iceland", route=route, tokens=1, server_ms=95.0, ttft_ms=ms)
        for number, (route, ms) in enumerate([("tunnel", 96.0), ("mesh", 97.5)] * 2)
    ]
    made = result(*summarize_stage(make_stage_run(*routes, of=of), Objective()), scenario=Scenario.OVERHEAD)
    (part,) = answer_parts(made)
    assert part.text == (
        "iceland: a request spends 1.00 ms outside the server (median, tunnel); the mesh adds 1.50 ms."
    )
    assert short_answer(made) == [], "the terminal has a line for each route"


@pytest.mark.parametrize(
    ("stages", "reason", "sentence"),
    [
        ([], None, "Partial result: the run still goes on, or it was killed. Nothing was measured."),
        (
            [measured()],
            "interrupted by Ctrl-C",
            "Partial result: interrupted by Ctrl-C. Each stage that is shown is whole.",
        ),
        (
            [measured("a"), measured("b", partial=True, planned=40, unfinished=2)],
            "x",
            "Partial result: x. In stage b, 10 of 40 requests had ended.",
        ),
    ],
)
def test_a_partial_result_says_so(stages: list[StageResult], reason: str | None, sentence: str) -> None:
    assert partial_sentence(result(*stages, partial=True, partial_reason=reason)) == sentence
    assert partial_sentence(result(*stages)) is None


def test_a_partial_result_of_several_runs_says_how_many_are_whole() -> None:
    made = result(measured(), partial=True, partial_reason="x", runs=(result(measured()), result(measured())))
    assert partial_sentence(made) == "Partial result: x. The figures are those of 2 whole runs."


def test_nothing_measured_has_no_answer() -> None:
    assert answer_parts(result()) == []
    assert short_answer(result()) == []
