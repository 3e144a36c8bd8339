"""A fleet of which nothing is known, and a node that lies, in simulated time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from statistics import mean

import pytest

from gpumesh.bench.simulate.fleet import Fault, FaultKind, ModelSpec, NodeSpec
from gpumesh.bench.simulate.offered_load import scale_to_load
from gpumesh.bench.simulate.simulation import PROBE_S, Simulation
from gpumesh.bench.simulate.workloads import Mix, Workload

MODEL = "llama3.1:8b"
SPEEDS = {100.0: 4, 50.0: 4, 70.0: 2, 35.0: 8}  # tokens/s, and slots


def make_fleet() -> list[NodeSpec]:
    return [
        NodeSpec(
            f"node{number}",
            {MODEL: ModelSpec(MODEL, speed, 40.0 * speed, load_s=4.0, vram_mib=6000.0, slots=slots)},
            loaded=(MODEL,),
            rtt_s=0.02,
        )
        for number, (speed, slots) in enumerate(SPEEDS.items())
    ]


def mean_s(fleet: Sequence[NodeSpec], policy: str, *, load: float, count: int, seed: int) -> float:
    workload = scale_to_load(Workload(Mix((MODEL,), (1.0,)), count, seed=seed), fleet, load)
    result = Simulation(fleet, workload, policy, seed=seed).run().result()
    assert result.completion.mean is not None
    return result.completion.mean


@cache
def honest_mean_s(load: float) -> float:
    """What the fleet takes when no node lies: the same for many tests."""
    return mean_s(make_fleet(), "adaptive", load=load, count=300, seed=1)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_a_cold_start_is_no_worse_than_least_loaded(load: float) -> None:
    """``benchmarks/cold_start.py`` has more of this."""
    fleet = make_fleet()
    own_s, other_s = (
        mean(mean_s(fleet, policy, load=load, count=40, seed=seed) for seed in range(10))
        for policy in ("adaptive", "least-loaded")
    )
    assert own_s <= 1.02 * other_s


def with_faults(fleet: Sequence[NodeSpec], liar: int, *faults: Fault) -> list[NodeSpec]:
    return [replace(node, faults=faults) if number == liar else node for number, node in enumerate(fleet)]


@pytest.mark.parametrize("factor", [0.01, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("liar", [0, 3])
def test_a_clock_that_lies_costs_nearly_nothing(liar: int, factor: float) -> None:
    fleet = with_faults(make_fleet(), liar, Fault(FaultKind.LYING, 0.0, math.inf, factor))
    assert mean_s(fleet, "adaptive", load=0.5, count=300, seed=1) <= 1.1 * honest_mean_s(0.5)


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        (FaultKind.SHIFTING, 0.01),
        (FaultKind.SHIFTING, 0.5),
        (FaultKind.MISCOUNTING, 0.0),
        (FaultKind.MISCOUNTING, 0.1),
        (FaultKind.MISCOUNTING, 0.5),
        (FaultKind.MISCOUNTING, 10.0),
        (FaultKind.NO_COUNTS, 1.0),
        (FaultKind.RANDOM_COUNTS, 10.0),
    ],
)
@pytest.mark.parametrize("liar", [0, 3])
def test_figures_that_lie_cost_nearly_nothing(liar: int, kind: FaultKind, factor: float, load: float) -> None:
    fleet = with_faults(make_fleet(), liar, Fault(kind, 0.0, math.inf, factor))
    lying_s = mean_s(fleet, "adaptive", load=load, count=300, seed=1)
    assert lying_s <= (1.2 if kind is FaultKind.RANDOM_COUNTS else 1.1) * honest_mean_s(load)


LISTS_MISSING = Fault(FaultKind.LISTS_MISSING, 0.0, math.inf)
CHANGES_ITS_LIST = tuple(
    Fault(FaultKind.HIDES, (2 * number + 0.5) * PROBE_S, (2 * number + 1.5) * PROBE_S) for number in range(200)
)


@pytest.mark.parametrize(
    "faults",
    [(LISTS_MISSING,), (LISTS_MISSING, *CHANGES_ITS_LIST), (Fault(FaultKind.HIDES, 0.0, math.inf),)],
    ids=["lists-missing", "changes-its-list", "hides"],
)
@pytest.mark.parametrize("liar", [0, 3])
def test_a_list_that_lies_costs_as_much_as_if_the_node_were_not_there(liar: int, faults: tuple[Fault, ...]) -> None:
    whole = make_fleet()
    others = [node for number, node in enumerate(whole) if number != liar]
    fleet = with_faults(whole, liar, *faults)
    workload = scale_to_load(Workload(Mix((MODEL,), (1.0,)), 300, seed=1), others, 0.5)
    result, without = (Simulation(nodes, workload, "adaptive").run().result() for nodes in (fleet, others))
    assert (result.lost, without.lost) == (0, 0)
    assert result.completion.mean is not None
    assert without.completion.mean is not None
    assert result.completion.mean <= 1.03 * without.completion.mean
    assert result.moved <= (2 if faults == (LISTS_MISSING,) else 60)  # one for each time that the list has changed
