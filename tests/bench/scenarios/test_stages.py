"""What each scenario would send, before anything is sent."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random
from typing import Any

import pytest

from gpumesh.bench.scenarios.balanced_order import balanced_rounds
from gpumesh.bench.scenarios.base import NodeFacts, ScenarioContext, StageOutcome
from gpumesh.bench.scenarios.catalog import scenario_steps
from gpumesh.bench.workload.prompts import PromptFactory
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.stages import Stage, StageKind
from gpumesh.bench.workload.traces import TracedRequest
from gpumesh.errors import UsageError

NODES = (NodeFacts("alpha"), NodeFacts("beta", parallel=4))
TRACE = (
    TracedRequest(10.0, 600, 5, (1, 2)),
    TracedRequest(10.5, 1100, 7, (1, 3, 4)),
    TracedRequest(14.0, 50_000, 9, (1, *range(100, 197))),
)


def planned(
    scenario: Scenario,
    settings: BenchSettings | None = None,
    *,
    nodes: tuple[NodeFacts, ...] = NODES,
    rng: Random | None = None,
    **options: Any,
) -> list[Stage]:
    """The stages that a scenario asks for, if no stage tells it anything."""
    settings = settings or BenchSettings("m")
    context = ScenarioContext(settings, nodes, PromptFactory(settings, rng or Random(7)), **options)
    steps = scenario_steps(scenario, context)
    stages = [next(steps)]
    while True:
        try:
            stages.append(steps.send(StageOutcome(())))
        except StopIteration:
            return stages


def shape(stage: Stage) -> tuple[str, StageKind, int, int | None]:
    return (stage.name, stage.kind, len(stage.requests), stage.concurrency)


def prompt(stage: Stage, index: int) -> str:
    return stage.requests[index].chat.messages[0].content


def test_each_begins_by_warming_up_every_node() -> None:
    """A full answer each: the model is loaded, and everything was used, before anything is measured."""
    for scenario in Scenario:
        warm = planned(scenario, trace=TRACE)[0]
        assert (warm.kind, [one.node for one in warm.requests]) == (StageKind.WARM_UP, ["alpha", "beta"])
        assert {one.chat.options["num_predict"] for one in warm.requests} == {64}
        assert warm.concurrency == 2, "all nodes load at the same time"


def test_quick_is_each_node_alone_and_then_all() -> None:
    made = planned(Scenario.QUICK)
    assert [shape(stage) for stage in made[1:]] == [
        ("alpha", StageKind.NODE, 10, 1),
        ("beta", StageKind.NODE, 10, 1),
        ("mesh", StageKind.MESH, 20, 2),
    ]
    assert {one.node for one in made[1].requests} == {"alpha"}
    assert {one.node for one in made[3].requests} == {None}, "the mesh chooses"
    assert sum(len(stage.requests) for stage in made) == 42
    fewer = planned(Scenario.QUICK, BenchSettings("m", requests=3, concurrency=(5,)))
    assert [shape(stage)[2:] for stage in fewer[1:]] == [(5, 5), (3, 1), (3, 1), (6, 5)]
    assert fewer[1].kind is StageKind.WARM_UP, "full answers at full concurrency"


def test_sweep_has_a_stage_for_each_level_with_enough_requests() -> None:
    chosen = planned(Scenario.SWEEP, BenchSettings("m", requests=100, concurrency=(3, 64)))
    assert [shape(stage)[2:] for stage in chosen[1:]] == [(64, 64), (102, 3), (256, 64)]
    assert chosen[1].kind is StageKind.WARM_UP
    few = planned(Scenario.SWEEP, BenchSettings("m", concurrency=(1, 2, 4)))
    assert [shape(stage)[2:] for stage in few[2:]] == [(10, 1), (10, 2), (16, 4)]


def test_scale_loads_each_node_as_it_was_chosen_and_the_mesh_with_the_sum() -> None:
    chosen = planned(Scenario.SCALE, BenchSettings("m", concurrency=(3,)))
    assert [shape(stage) for stage in chosen[1:]] == [
        ("warm-up at 3", StageKind.WARM_UP, 3, 3),
        ("warm-up at 3", StageKind.WARM_UP, 3, 3),
        ("alpha", StageKind.NODE, 15, 3),
        ("beta", StageKind.NODE, 15, 3),
        ("mesh", StageKind.MESH, 30, 6),
    ]


def test_overhead_is_one_token_for_each_route_and_node() -> None:
    near = NodeFacts("alpha", routes=("direct", "direct again", "mesh", "gateway"))
    far = NodeFacts("beta", routes=("tunnel", "tunnel again", "mesh"))
    made = planned(Scenario.OVERHEAD, nodes=(near, far))
    assert [shape(stage) for stage in made[1:]] == [
        ("alpha", StageKind.NODE, 200, 1),
        ("beta", StageKind.NODE, 150, 1),
    ]
    assert {one.chat.options["num_predict"] for one in made[1].requests} == {1}
    prompts = {prompt(made[1], index) for index in range(200)}
    assert len(prompts) == 200, "no route answers from the cache that another one filled"
    for start in range(0, 200, 4):
        taken = made[1].requests[start : start + 4]
        assert {one.route for one in taken} == set(near.routes), "each round takes each route"


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_no_route_is_favoured_by_its_position_or_by_the_one_before_it(size: int) -> None:
    rows = list(balanced_rounds(range(size), 4 * 2 * size, Random(1)))
    for position in range(size):
        assert set(Counter(row[position] for row in rows).values()) == {len(rows) // size}
    followers = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(followers) == size * (size - 1)
    assert len(set(followers.values())) == 1, "each follows each other one equally often"


def test_the_order_is_drawn_and_part_of_a_square_will_do() -> None:
    orders = [tuple(balanced_rounds("abcd", 4, Random(seed))) for seed in range(6)]
    assert len(set(orders)) > 1
    assert len(list(balanced_rounds("abc", 7, Random(1)))) == 7


def test_failover_takes_a_node_away_from_a_steady_load() -> None:
    warm, stage = planned(Scenario.FAILOVER)[1:]
    assert (warm.kind, warm.concurrency) == (StageKind.WARM_UP, 4)
    assert shape(stage) == ("failover", StageKind.MESH, 40, 4)
    assert stage.disturb
    with pytest.raises(UsageError, match="two nodes"):
        planned(Scenario.FAILOVER, nodes=NODES[:1])


def test_replay_sends_when_the_trace_did() -> None:
    (stage,) = planned(Scenario.REPLAY, BenchSettings("m", speed=2.0), trace=TRACE)[1:]
    assert stage.open_loop
    assert [one.at_s for one in stage.requests] == [0.0, 0.25, 2.0]
    assert [one.chat.options["num_predict"] for one in stage.requests] == [5, 7, 9]
    (short,) = planned(Scenario.REPLAY, BenchSettings("m", requests=2), trace=TRACE)[1:]
    assert len(short.requests) == 2
    with pytest.raises(UsageError, match="needs a trace"):
        planned(Scenario.REPLAY)


def test_replay_shares_what_the_trace_shares_and_nothing_else() -> None:
    (stage,) = planned(Scenario.REPLAY, trace=TRACE)[1:]
    first, second, third = (prompt(stage, index) for index in range(3))
    shared = first.index("]") + 1 + round(512 / 1.3) * 4
    assert first[:shared] == second[:shared] == third[:shared]
    words = {name: len(text.split()) for name, text in (("first", first), ("second", second))}
    assert words["first"] == pytest.approx(600 / 1.3, rel=0.05)
    assert words["second"] == pytest.approx(1100 / 1.3, rel=0.05)
    assert first.split()[400:] != second.split()[400 : words["first"]], "their second blocks differ"
    (again,) = planned(Scenario.REPLAY, rng=Random(8), trace=TRACE)[1:]
    assert prompt(again, 0) != first, "what an earlier run left in a cache is of no use"
    assert prompt(again, 0).split()[1:] == first.split()[1:], "but it is the same load"


def test_what_is_replayed_fits_the_context() -> None:
    notes: list[str] = []
    (stage,) = planned(Scenario.REPLAY, BenchSettings("m", max_context=2048), trace=TRACE, notes=notes)[1:]
    assert len(prompt(stage, 2).split()) == pytest.approx(2048 / 1.3, rel=0.05)
    assert notes == ["1 of the trace's 3 prompts were cut to 2,048 tokens: their TTFT is that of a shorter prompt"]


def test_each_prompt_begins_with_a_nonce_of_its_own() -> None:
    prompts = PromptFactory(BenchSettings("m", prompt_tokens=100, tokens=9, think=True, seed=3), Random(1))
    first, second = prompts.make_prompt(), prompts.make_prompt()
    said = [one.messages[0].content for one in (first, second)]
    assert said[0][:10] != said[1][:10], "no prefix cache can help"
    assert (first.model, first.think, first.stream) == ("m", True, True)
    assert dict(first.options) == {"num_predict": 9, "temperature": 0, "seed": 3}
    assert len(said[0].split()) == pytest.approx(100 / 1.3, rel=0.15)


def test_the_same_seed_makes_the_same_load_but_for_the_nonce() -> None:
    one, two = (
        PromptFactory(BenchSettings("m", seed=5), Random(number)).make_prompt().messages[0].content for number in (1, 2)
    )
    assert one != two
    assert one.partition("]")[2] == two.partition("]")[2]
    other = PromptFactory(BenchSettings("m", seed=6), Random(1)).make_prompt().messages[0].content
    assert other.partition("]")[2] != one.partition("]")[2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (BenchSettings("m", requests=0), "-n must be at least 1, not 0"),
        (BenchSettings("m", tokens=0), "--tokens"),
        (BenchSettings("m", prompt_tokens=0), "--prompt-tokens"),
        (BenchSettings("m", prompt_tokens=200_001), "--prompt-tokens can be 200000 at most"),
        (BenchSettings("m", concurrency=(4, 0)), "-c"),
        (BenchSettings("m", speed=0.0), "--speed"),
    ],
)
def test_what_cannot_be_run_is_told(settings: BenchSettings, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        planned(Scenario.QUICK, settings)


def test_without_a_node_there_is_nothing_to_plan() -> None:
    with pytest.raises(UsageError, match="no node that is up has the model 'm'"):
        planned(Scenario.QUICK, nodes=())
