"""What a fleet of which nothing is known costs, and what a node that lies costs: in simulation, over many seeds.

    python benchmarks/cold_start.py [--seeds N]

- Cold start: 10 requests for each node, from the first on; nothing was measured, no slots are known. The mean time of
  ``adaptive`` ÷ that of ``least-loaded``. The nodes are listed mixed, the fast ones first, and the slow ones
  first. The error is that of the mean over the seeds.
- A liar: one node of four says durations that are so many times the true ones. The mean time ÷ that of the same fleet
  without a lie. ``worst seed``: the largest ratio of a single run.

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
from gpumesh.bench.simulate.simulation import Simulation
from gpumesh.bench.simulate.workloads import Mix, Workload

LOADS = (0.2, 0.5, 0.8, 0.95)
ORDERS = ("mixed", "fast first", "slow first")
COLD_PER_NODE = 10
LYING_NODES, LYING_PER_NODE = 4, 200
LIES = (0.01, 0.5, 2.0, 100.0)


def order_fleet(count: int, order: str) -> list[NodeSpec]:
    fleet = make_fleet(count, 0)
    if order != "mixed":
        fleet.sort(key=lambda node: node.models[MODEL].tokens_per_s, reverse=order == "fast first")
    return [replace(node, name=f"node{number}") for number, node in enumerate(fleet)]


def mean_s(fleet: Sequence[NodeSpec], policy: str, load: float, count: int, seed: int) -> float:
    """The mean time of a request, in seconds of the simulated clock."""
    workload = scale_to_load(Workload(Mix((MODEL,), (1.0,)), count, seed=seed), fleet, load)
    result = Simulation(fleet, workload, policy, seed=seed, max_queue=MAX_QUEUE).run().result()
    assert result.completion.mean is not None
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


def lies(seeds: int) -> Iterator[str]:
    yield f"| liar, factor | {' | '.join(f'load {load:.0%}: mean, worst seed' for load in LOADS)} |"
    yield "|---" * (len(LOADS) + 1) + "|"
    honest = make_fleet(LYING_NODES, 0)
    count = LYING_NODES * LYING_PER_NODE
    honest_s = {
        (load, seed): mean_s(honest, "adaptive", load, count, seed) for load in LOADS for seed in range(1, seeds + 1)
    }
    for liar in (0, 1):  # the fastest, and a slower one
        for factor in LIES:
            fault = Fault(FaultKind.LYING, 0.0, math.inf, factor)
            fleet = [replace(node, faults=(fault,)) if i == liar else node for i, node in enumerate(honest)]
            cells = []
            for load in LOADS:
                ratios = [
                    mean_s(fleet, "adaptive", load, count, seed) / honest_s[load, seed] for seed in range(1, seeds + 1)
                ]
                cells.append(f"{mean(ratios):.2f}, {max(ratios):.2f}")
            yield f"| {NODE_KINDS[liar][0]:.0f} tokens/s, {factor:g} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    for lines in (cold_starts(options.seeds), lies(max(options.seeds // 4, 2))):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
