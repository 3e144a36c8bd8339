"""Where the mesh loses against its nodes, why it seems to gain, and where a sweep has its knee."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.scaling import NodeLoss, Scaling, scaling
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.stages import StageKind
from tests.bench.example_results import make_stage_run, record, stage, summarize_only

ROUNDS = 6


def answers(
    node: str, slots: int, *, each_s: float = 1.0, load_s: float = 0.0, rounds: int = ROUNDS
) -> list[LoadSample]:
    """Each slot gives one answer of ten tokens after the other, each in ``each_s``. In the third round, all of them
    wait ``load_s`` for a load."""
    records: list[LoadSample] = []
    for slot in range(slots):
        at_s = 0.0
        for number in range(rounds):
            wait_s = load_s if number == 2 else 0.0
            total_s = wait_s + each_s
            counters = ServerCounters(7, 10, total_s * 1e3, wait_s * 1e3, 0.0, each_s * 1e3)
            first_ms = (wait_s + each_s / 10) * 1e3
            index = slot * rounds + number
            made = record(index, sent_s=at_s, ttft_ms=first_ms, gap_ms=each_s * 100, tokens=10, counters=counters)
            records.append(replace(made, node=node))
            at_s += total_s
    return records


def alone(node: str, slots: int, each_s: float = 1.0) -> StageResult:
    of = stage(node, count=slots * ROUNDS, kind=StageKind.NODE, node=node, concurrency=slots)
    return summarize_only(make_stage_run(*answers(node, slots, each_s=each_s), of=of))


def together(*records: LoadSample, concurrency: int) -> StageResult:
    return summarize_only(make_stage_run(*records, of=stage(count=len(records), concurrency=concurrency)))


def measured(*stages: StageResult) -> Scaling:
    made = scaling(stages)
    assert made is not None
    return made


def parts(loss: NodeLoss) -> list[float]:
    return [loss.starved_tokens_per_s, loss.swapped_tokens_per_s, loss.slowed_tokens_per_s]


def test_nothing_is_lost_where_all_slots_are_busy() -> None:
    mesh = together(*answers("alpha", 4), *answers("beta", 2), concurrency=6)
    made = measured(alone("alpha", 4), alone("beta", 2), mesh)
    assert (made.sum_tokens_per_s, made.efficiency) == pytest.approx((60.0, 1.0))
    assert made.explanation is None
    assert [loss.slots for loss in made.losses] == pytest.approx([4.0, 2.0])
    assert [part for loss in made.losses for part in parts(loss)] == pytest.approx([0.0] * 6, abs=1e-9)
    assert made.tail_share == pytest.approx(0.0, abs=0.01)


def test_slots_without_requests_are_starved() -> None:
    mesh = together(*answers("alpha", 4), *answers("beta", 1), concurrency=5)
    made = measured(alone("alpha", 4), alone("beta", 2), mesh)
    assert parts(made.losses[1]) == pytest.approx([10.0, 0.0, 0.0], abs=1e-9)
    assert made.efficiency == pytest.approx(5 / 6)
    assert made.explanation == (
        "beta worked on 1.0 requests at once in the mesh and on 2.0 alone: its slots were starved"
    )
    unused = measured(alone("alpha", 4), alone("beta", 2), together(*answers("alpha", 4), concurrency=4))
    assert parts(unused.losses[1]) == pytest.approx([20.0, 0.0, 0.0], abs=1e-9)


def test_slots_that_give_less_are_slowed() -> None:
    mesh = together(*answers("alpha", 4, each_s=1.25), *answers("beta", 2), concurrency=6)
    made = measured(alone("alpha", 4), alone("beta", 2), mesh)
    assert parts(made.losses[0]) == pytest.approx([0.0, 0.0, 8.0], abs=0.3)
    assert made.explanation == "alpha gave each request 8 tok/s in the mesh and 10 alone: its neighbours slowed it"


def test_loads_are_swapped_models() -> None:
    """Two slots wait 3 s of the 7 s between the first round and the last send."""
    mesh = together(*answers("alpha", 4, rounds=ROUNDS + 3), *answers("beta", 2, load_s=3.0), concurrency=6)
    made = measured(alone("alpha", 4), alone("beta", 2), mesh)
    starved, swapped, slowed = parts(made.losses[1])
    assert swapped == pytest.approx(2 * 3 / 7 * 10, rel=0.02)
    assert (starved, slowed) == pytest.approx((0.0, 0.0), abs=0.5)
    assert made.explanation is not None
    assert "beta loaded the model" in made.explanation


def test_more_than_100_percent_has_its_reason() -> None:
    both = [*answers("alpha", 4), *answers("beta", 2)]
    not_full = measured(alone("alpha", 2), alone("beta", 2), together(*both, concurrency=6))
    assert not_full.efficiency == pytest.approx(1.5)
    assert not_full.explanation == (
        "alpha worked on 4.0 requests at once in the mesh and on 2.0 alone: alone it was not at its capacity"
    )
    slow_alone = measured(alone("alpha", 4, each_s=2.0), alone("beta", 2), together(*both, concurrency=6))
    assert slow_alone.explanation == (
        "alpha gave each request 10 tok/s in the mesh and 5 alone: something slowed it while alone"
    )
    third = together(*both, *answers("gamma", 1), concurrency=7)
    made = measured(alone("alpha", 4), alone("beta", 2), third)
    assert made.explanation == "the mesh also used gamma, which was not measured alone"
    short = summarize_only(make_stage_run(record(tokens=300, node="alpha"), of=stage("mesh"), duration_s=1.0))
    nodes = [
        summarize_only(
            make_stage_run(record(node=name), of=stage(name, kind=StageKind.NODE, node=name), duration_s=1.0)
        )
        for name in ("alpha", "beta")
    ]
    made = measured(*nodes, short)
    assert made.losses == ()
    assert made.explanation == "the stages were too short to say why: measure more requests (-n)"


def level(number: int, *, slots: int = 8) -> StageResult:
    """A stage of a sweep: ``slots`` answers run at once, and the others wait for them."""
    records = answers("alpha", min(number, slots))
    waits = number > slots
    late = [replace(one, intended_s=one.sent_s - 1.0) if waits else one for one in records]
    return summarize_only(
        make_stage_run(*late, of=stage(f"c={number}", count=len(late), concurrency=min(number, slots)))
    )


def at(number: int) -> StageResult:
    return replace(level(number), concurrency=number)


def test_the_knee_is_where_the_rate_stops_to_grow() -> None:
    knee = find_knee([at(number) for number in (1, 2, 4, 8, 12, 16)], Objective(ttft_ms=500.0))
    assert knee is not None
    assert (knee.level, knee.best_goodput_level, knee.is_passed) == (8, 8, True)
    assert (knee.tokens_per_s, knee.goodput_per_s) == pytest.approx((80.0, 8.0))
    assert knee.text == "8 in flight: 80 tok/s, TTFT 100 ms; past it only waiting grows"
    assert knee.goodput_text == "goodput 8 req/s (TTFT ≤ 500 ms and TPOT ≤ 200 ms)"


def test_a_knee_that_was_not_passed_is_told() -> None:
    knee = find_knee([at(number) for number in (1, 2, 4)], Objective())
    assert knee is not None
    assert (knee.level, knee.is_passed) == (4, False)
    assert "that is the highest level, and more may still give more" in knee.text
    assert find_knee([at(4)], Objective()) is None
    assert find_knee([], Objective()) is None
