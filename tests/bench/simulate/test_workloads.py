"""Workloads: the same requests for a seed, their rates, conversations, and the scaling to a load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from gpumesh.balancer.base import Priority
from gpumesh.bench.simulate import offered_load
from gpumesh.bench.simulate.offered_load import (
    OfferedWork,
    fleet_capacity,
    measure_work,
    measure_workload,
    scale_to_load,
)
from gpumesh.bench.simulate.requests import SimulatedRequest
from gpumesh.bench.simulate.servers.blocks import common_blocks
from gpumesh.bench.simulate.simulation import Simulation
from gpumesh.bench.simulate.workloads import BLOCK_TOKENS, Mix, Workload
from gpumesh.bench.workload.traces import TracedRequest
from gpumesh.errors import UsageError
from tests.bench.simulate.build import MODEL, OTHER, node

ONE_MODEL = Mix((MODEL.name,), (1.0,))


def turns_of(first: SimulatedRequest) -> Iterator[SimulatedRequest]:
    turn: SimulatedRequest | None = first
    while turn is not None:
        yield turn
        turn = turn.next_turn


def test_the_same_seed_gives_the_same_requests() -> None:
    workload = Workload(Mix((MODEL.name, OTHER.name), (0.7, 0.3)), 500, rate=2.0, clients=5, batch=3)
    assert list(workload) == list(workload)
    assert list(workload) != list(replace(workload, seed=2))
    assert [request.number for request in workload] == list(range(503))


def test_rates_lengths_and_shares_are_those_asked_for() -> None:
    priorities = Mix((Priority.INTERACTIVE, Priority.NORMAL), (1.0, 3.0))
    models = Mix((MODEL.name, OTHER.name), (0.7, 0.3))
    requests = list(Workload(models, 20_000, rate=2.0, prompt_tokens=400, output_tokens=200, priorities=priorities))
    assert len(requests) / requests[-1].at_s == pytest.approx(2.0, rel=0.05)
    assert sum(each.prompt_tokens for each in requests) / len(requests) == pytest.approx(400, rel=0.05)
    assert sum(each.output_tokens for each in requests) / len(requests) == pytest.approx(200, rel=0.05)
    assert sum(each.model == OTHER.name for each in requests) / len(requests) == pytest.approx(0.3, rel=0.05)
    interactive = sum(each.priority is Priority.INTERACTIVE for each in requests)
    assert interactive / len(requests) == pytest.approx(0.25, rel=0.05)


def test_a_turn_repeats_all_that_was_said() -> None:
    first, other, *_ = Workload(ONE_MODEL, 12, turns=6, system_prompts=1, system_tokens=5 * BLOCK_TOKENS)
    turns = list(turns_of(first))
    assert len(turns) == 6
    for turn, following in itertools.pairwise(turns):
        assert following.prompt_tokens > turn.prompt_tokens + turn.output_tokens
        assert following.blocks[: len(turn.end_blocks)] == turn.end_blocks
        assert len(turn.blocks) == turn.prompt_tokens // BLOCK_TOKENS
    assert common_blocks(first.blocks, other.blocks) == 5  # the system prompt


def test_a_trace_keeps_its_blocks_and_its_times() -> None:
    trace = [TracedRequest(0.0, 1000, 5, (1, 2)), TracedRequest(3.0, 600, 6, (1, 9))]
    first, second = Workload(ONE_MODEL, 2, trace=trace, time_factor=0.5)
    assert (first.at_s, second.at_s) == (0.0, 1.5)
    assert (second.blocks, second.block_tokens) == ((1, 9), 512)


def test_the_batch_comes_first() -> None:
    requests = list(Workload(ONE_MODEL, 2, batch=3))
    assert [each.priority for each in requests[:4]] == [Priority.BATCH] * 3 + [Priority.NORMAL]
    assert [each.at_s for each in requests[:3]] == [0.0] * 3


def test_a_capacity_by_hand() -> None:
    def capacity(**changes: Any) -> float:
        return fleet_capacity([node(**changes)], OfferedWork(1.0, {MODEL.name: [(100, 100)]}, {MODEL.name: 1.0}))

    # Two slots: a request reads for 0.1 s and generates for 1 s, alone, or with another at 1.5 times the time.
    assert capacity() == pytest.approx(2 / 1.1, rel=0.01)
    assert capacity(share=0.5) == pytest.approx(2 / 1.6, rel=0.05)
    # One prompt at a time, and no answer meanwhile: x requests leave 1 - 0.1 x seconds of each second to two streams.
    assert capacity(prefill_stall=1.0, prefill_lanes=1) == pytest.approx(2 / 1.2, rel=0.01)
    assert capacity(models=(OTHER,), loaded=()) == 0.0


def test_a_capacity_for_two_models_is_that_of_one_after_the_other() -> None:
    slow = replace(OTHER, tokens_per_s=50.0, prefill_tokens_per_s=500.0)
    samples = {MODEL.name: [(100, 100)], slow.name: [(100, 100)]}
    work = OfferedWork(1.0, samples, {MODEL.name: 0.75, slow.name: 0.25})
    seconds = (0.75 * 1.1 + 0.25 * 2.2) / 2
    assert fleet_capacity([node(models=(MODEL, slow)), node()], work) == pytest.approx(1 / seconds + 2 / 1.1, rel=0.01)


def test_the_nodes_that_alone_have_a_model_bound_the_capacity() -> None:
    samples = {MODEL.name: [(100, 100)], OTHER.name: [(100, 100)]}
    work = OfferedWork(1.0, samples, {MODEL.name: 0.5, OTHER.name: 0.5})
    fleet = [node(), node(), node(), node(models=(OTHER,))]
    # The last node answers 2 / 1.1 requests for its model a second, which are half of all.
    assert fleet_capacity(fleet, work) == pytest.approx(2 * 2 / 1.1, rel=0.01)
    # A model that no node has bounds nothing.
    assert fleet_capacity([node()], work) == pytest.approx(2 / 1.1, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"share": 0.4},
        {"share": 0.2, "prefill_stall": 1.0, "prefill_lanes": 1},
        {"prefill_stall": 0.5, "prefill_lanes": 1, "models": [replace(MODEL, slots=8, prefill_tokens_per_s=400.0)]},
    ],
)
def test_a_fleet_is_as_busy_as_the_load_says(changes: dict[str, Any]) -> None:
    """Just below its capacity a node keeps up; beyond, it does not."""
    fleet = [node(**changes)]
    workload = Workload(ONE_MODEL, 2000, prompt_tokens=300, output_tokens=100)
    span_s = {}
    for load in (0.9, 1.3):
        scaled = scale_to_load(workload, fleet, load)
        last_at_s = list(scaled)[-1].at_s
        ended_at = Simulation(fleet, scaled, "round-robin", max_queue=10**6).run().result().makespan_s
        span_s[load] = ended_at / last_at_s
    assert span_s[0.9] == pytest.approx(1.0, abs=0.03)
    assert span_s[1.3] == pytest.approx(1.3, abs=0.06)


def test_what_one_cache_would_hold_is_not_counted_as_work() -> None:
    requests = [
        SimulatedRequest(0, 0.0, MODEL.name, 1000, 10, blocks=(1, 2), block_tokens=500),
        SimulatedRequest(1, 1.0, MODEL.name, 1500, 10, blocks=(1, 2, 3), block_tokens=500),
        SimulatedRequest(2, 2.0, MODEL.name, 1000, 10, blocks=(7, 8), block_tokens=500),
    ]
    work = measure_work(requests, [node()])
    assert work.samples == {MODEL.name: [(1000, 10), (500, 10), (1000, 10)]}
    assert work.rate == pytest.approx(1.5)


def test_of_many_random_requests_a_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered_load, "MOST_MEASURED", 5000)
    workload = Workload(ONE_MODEL, 20_000, rate=2.0)
    work = measure_workload(workload, [node()])
    assert work == measure_work(itertools.islice(workload, 5000), [node()])
    assert work.rate == pytest.approx(2.0, rel=0.05)
    # Another part of these would be no sample of all.
    trace = [TracedRequest(number**2 / 1e6, 100, 5) for number in range(6000)]
    for uneven in (replace(workload, batch=10), replace(workload, trace=trace)):
        assert measure_workload(uneven, [node()]) == measure_work(uneven, [node()])


def test_a_fleet_without_the_model_has_no_load() -> None:
    with pytest.raises(UsageError, match="no node of the fleet"):
        scale_to_load(Workload(Mix(("none:latest",), (1.0,)), 10), [node()], 0.5)
