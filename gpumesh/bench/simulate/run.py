"""Runs the same workload under several policies."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.bench.simulate.fleet import NodeSpec
from gpumesh.bench.simulate.offered_load import fleet_capacity, measure_workload, scale_to_capacity
from gpumesh.bench.simulate.report import SimulationResult
from gpumesh.bench.simulate.simulation import Simulation
from gpumesh.bench.simulate.workloads import Workload


def simulate_policies(
    nodes: Sequence[NodeSpec],
    workload: Workload,
    policies: Sequence[str],
    *,
    source: str,
    load: float | None = None,
    max_queue: int = 1024,
) -> SimulationResult:
    """Simulates the workload under each policy. ``source`` says in words where the requests come from. ``load``: as
    ``scale_to_load``; ``None`` leaves the times of the workload as they are. Raises UsageError if the load cannot be
    reached, or if the workload has no requests."""
    work = measure_workload(workload, nodes)  # once: this draws the requests
    capacity = fleet_capacity(nodes, work)
    if load is not None:
        workload = scale_to_capacity(workload, work.rate, capacity, load)
    results = [
        Simulation(nodes, workload, policy, seed=workload.seed, max_queue=max_queue).run().result()
        for policy in policies
    ]
    return SimulationResult(
        workload=source,
        seed=workload.seed,
        requests=results[0].served + results[0].lost,
        offered_per_s=work.rate if load is None else load * capacity,
        capacity_per_s=capacity,
        nodes=tuple(nodes),
        policies=tuple(results),
    )
