"""What a fleet of which nothing is known costs, and what a node that lies costs: in simulation, over many seeds.

    python benchmarks/cold_start.py [--seeds N]

- Cold start: 10 requests for each node, from the first on; nothing was measured, no slots are known. The mean time of
  ``adaptive`` ÷ that of ``least-loaded``. The nodes are listed mixed, the fast ones first, and the slow ones
  first. The error is that of the mean over the seeds.
- A liar: one node of four says durations or counts of tokens that are so many times the true ones, or gives no counts.
  The first line of each liar is the fleet without this node, under the same requests: a lie should cost less.
  ``random``: each count is another random number of times the true one, up to so many times more or fewer. The mean
  time ÷ that of the same fleet without a lie. ``worst seed``: the largest ratio of a single run.
- A list that lies: one node of four lists the model, and answers 404 for it; always, or in every second probe. Or it
  has the model, and does not list it. The mean time ÷ that of the fleet without this node, at a load that is relative
  to what the other nodes can do.

The requests are independent: about 400 tokens of prompt and 200 of answer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean, stdev

from policies import MAX_QUEUE, MODEL, NODE_KINDS, make_fleet

from gpumesh.bench.simulate.fleet import Fault, FaultKind, NodeSpec
from gpumesh.bench.simulate.offered_load import scale_to_load
from gpumesh.bench.simulate.simulation import PROBE_S, Simulation
from gpumesh.bench.simulate.workloads import Mix, Workload

LOADS = (0.2, 0.5, 0.8, 0.95)
ORDERS = ("mixed", "fast first", "slow first")
COLD_PER_NODE = 10
LYING_NODES, LYING_PER_NODE = 4, 200
LIARS = (0, 1)  # the fastest node, and a slower one
LIES = (
    *((FaultKind.LYING, factor) for factor in (0.01, 0.5, 2.0, 100.0)),
    *((FaultKind.SHIFTING, factor) for factor in (0.01, 0.5, 2.0)),
    *((FaultKind.MISCOUNTING, factor) for factor in (0.0, 0.1, 0.5, 2.0, 10.0)),
    (FaultKind.RANDOM_COUNTS, 10.0),
    (FaultKind.NO_COUNTS, 1.0),
)
LIE_NAMES = {
    FaultKind.LYING: "durations x {:g}",
    FaultKind.SHIFTING: "generating x {:g}, the total true",
    FaultKind.MISCOUNTING: "counts x {:g}",
    FaultKind.RANDOM_COUNTS: "counts x random, up to {:g}",
    FaultKind.NO_COUNTS: "no counts",
}
CHANGES = 1000  # how often a list changes that is wrong in every second probe
FALSE_LISTS: dict[str, tuple[Fault, ...]] = {
    "lists it, and answers 404": (Fault(FaultKind.LISTS_MISSING, 0.0, math.inf),),
    "… in every second probe": (
        # It never has the model. In the second half of each time it does not even list it.
        Fault(FaultKind.LISTS_MISSING, 0.0, math.inf),
        *(Fault(FaultKind.HIDES, (2 * n + 0.5) * PROBE_S, (2 * n + 1.5) * PROBE_S) for n in range(CHANGES)),
    ),
    "has it, and does not list it": (Fault(FaultKind.HIDES, 0.0, math.inf),),
}


def order_fleet(count: int, order: str) -> list[NodeSpec]:
    fleet = make_fleet(count, 0)
    if order != "mixed":
        fleet.sort(key=lambda node: node.models[MODEL].tokens_per_s, reverse=order == "fast first")
    return [replace(node, name=f"node{number}") for number, node in enumerate(fleet)]


def mean_s(
    fleet: Sequence[NodeSpec],
    policy: str,
    load: float,
    count: int,
    seed: int,
    *,
    capacity_of: Sequence[NodeSpec] | None = None,
) -> float:
    """The mean time of a request, in seconds of the simulated clock. ``capacity_of``: the fleet to whose capacity the
    load is relative; ``None``: to that of the fleet itself."""
    workload = Workload(Mix((MODEL,), (1.0,)), count, seed=seed)
    workload = scale_to_load(workload, fleet if capacity_of is None else capacity_of, load)
    result = Simulation(fleet, workload, policy, seed=seed, max_queue=MAX_QUEUE).run().result()
    assert result.completion.mean is not None
    assert result.lost == 0
    return result.completion.mean


def cold_starts(seeds: int) -> Iterator[str]:
    yield f"| nodes, order | {' | '.join(f'load {load:.0%}' for load in LOADS)} |"
    yield "|---" * (len(LOADS) + 1) + "|"
    for count in (2, 4, 8, 16):
        for order in ORDERS:
            fleet = order_fleet(count, order)
            cells = []
            for load in LOADS:
                pairs = [
                    [
                        mean_s(fleet, policy, load, COLD_PER_NODE * count, seed)
                        for policy in ("adaptive", "least-loaded")
                    ]
                    for seed in range(1, seeds + 1)
                ]
                other_s = mean(other for _, other in pairs)
                error = stdev(own - other for own, other in pairs) / math.sqrt(seeds) / other_s
                cells.append(f"{mean(own for own, _ in pairs) / other_s:.2f} ± {error:.2f}")
            yield f"| {count}, {order} | {' | '.join(cells)} |"


def with_faults(fleet: Sequence[NodeSpec], liar: int, faults: tuple[Fault, ...]) -> list[NodeSpec]:
    return [replace(node, faults=faults) if number == liar else node for number, node in enumerate(fleet)]


def lies(seeds: int) -> Iterator[str]:
    yield f"| liar, lie | {' | '.join(f'load {load:.0%}: mean, worst seed' for load in LOADS)} |"
    yield "|---" * (len(LOADS) + 1) + "|"
    honest = make_fleet(LYING_NODES, 0)
    count = LYING_NODES * LYING_PER_NODE
    honest_s = {
        (load, seed): mean_s(honest, "adaptive", load, count, seed) for load in LOADS for seed in range(1, seeds + 1)
    }
    for liar in LIARS:
        fleets = {"(without this node)": [node for number, node in enumerate(honest) if number != liar]}
        for kind, factor in LIES:
            fault = Fault(kind, 0.0, math.inf, factor)
            fleets[LIE_NAMES[kind].format(factor)] = with_faults(honest, liar, (fault,))
        for name, fleet in fleets.items():
            cells = []
            for load in LOADS:
                ratios = [
                    mean_s(fleet, "adaptive", load, count, seed, capacity_of=honest) / honest_s[load, seed]
                    for seed in range(1, seeds + 1)
                ]
                cells.append(f"{mean(ratios):.2f}, {max(ratios):.2f}")
            yield f"| {NODE_KINDS[liar][0]:.0f} tokens/s, {name} | {' | '.join(cells)} |"


def false_lists(seeds: int) -> Iterator[str]:
    yield f"| liar, list | {' | '.join(f'load {load:.0%}: mean, worst seed' for load in LOADS)} |"
    yield "|---" * (len(LOADS) + 1) + "|"
    whole = make_fleet(LYING_NODES, 0)
    count = LYING_NODES * LYING_PER_NODE
    for liar in LIARS:
        others = [node for number, node in enumerate(whole) if number != liar]
        for name, faults in FALSE_LISTS.items():
            fleet = with_faults(whole, liar, faults)
            cells = []
            for load in LOADS:
                ratios = [
                    mean_s(fleet, "adaptive", load, count, seed, capacity_of=others)
                    / mean_s(others, "adaptive", load, count, seed)
                    for seed in range(1, seeds + 1)
                ]
                cells.append(f"{mean(ratios):.2f}, {max(ratios):.2f}")
            yield f"| {NODE_KINDS[liar][0]:.0f} tokens/s, {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    few = max(options.seeds // 4, 2)
    for lines in (cold_starts(options.seeds), lies(few), false_lists(few)):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
