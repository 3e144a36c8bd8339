"""How long `gpumesh bench simulate` takes for a million requests over 100 nodes, and where the time goes.

    python benchmarks/simulation_speed.py [--requests 1000000] [--nodes 100] [--load 0.8] [--check]
    python benchmarks/simulation_speed.py --split [--requests 50000] [--loads 0.5,0.8,0.95]

The first form runs the command as a user does, with the policy ``adaptive``: the goal is less than 180 s. ``--split``
simulates in this process, and says how many microseconds of a request's time are the simulator's own (the heap of
events, the servers, the figures) and how many the balancer's. One simulation uses one core. CPU time is shown beside
the time on the wall, which a busy machine makes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from time import thread_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpumesh.bench.simulate.fleet_file import parse_fleet  # noqa: E402
from gpumesh.bench.simulate.offered_load import scale_to_load  # noqa: E402
from gpumesh.bench.simulate.requests import Decisions  # noqa: E402
from gpumesh.bench.simulate.simulation import Simulation  # noqa: E402
from gpumesh.bench.simulate.workloads import Mix, Workload  # noqa: E402

MODEL = "llama3.1:8b"
POLICY = "adaptive"
LIMIT_S = 180.0
# The nodes of the fleet in turn: tokens/s, slots, and the round trip in ms.
NODE_KINDS = ((100, 4, 1), (50, 4, 40), (70, 2, 20), (35, 8, 80))
CALLS = ("submit", "grants", "next_check", "note_first_token", "end", "set_report")


def write_fleet(count: int) -> str:
    """A fleet file with so many nodes."""
    nodes = []
    for index in range(count):
        tokens_per_s, slots, rtt_ms = NODE_KINDS[index % len(NODE_KINDS)]
        node = {"name": f"n{index}", "tokens_per_s": tokens_per_s, "slots": slots, "rtt_ms": rtt_ms}
        nodes.append({**node, "prefill_tokens_per_s": 40 * tokens_per_s, "models": [MODEL], "loaded": [MODEL]})
    return json.dumps({"nodes": nodes})


# -- the command ------------------------------------------------------------------------------------------------------


def run_command(nodes: int, requests: int, load: float) -> tuple[float, float, dict[str, Any]]:
    """Runs the command in a process of its own. Returns its time on the wall, its CPU time, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        fleet = Path(folder) / "fleet.yaml"
        fleet.write_text(write_fleet(nodes))
        argv = [sys.executable, "-P", "-m", "gpumesh", "bench", "simulate", "--fleet", str(fleet), "--policy", POLICY]
        argv += ["--poisson", "10", "--load", str(load), "-n", str(requests), "--max-queue", "100000", "--json"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started_at = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=environment).stdout
        wall_s = time.monotonic() - started_at
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, cpu_s, json.loads(out)["policies"][0]


# -- where the time goes ----------------------------------------------------------------------------------------------


class TimedDecisions:
    """A balancer whose time is measured. ``cpu_s``: the CPU time in its methods, ``calls``: how often they ran."""

    def __init__(self, decisions: Decisions) -> None:
        self.cpu_s = dict.fromkeys(CALLS, 0.0)
        self.calls = dict.fromkeys(CALLS, 0)
        for name in CALLS:
            setattr(self, name, self._timed(name, getattr(decisions, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **named: Any) -> Any:
            started_at = thread_time()
            try:
                return method(*args, **named)
            finally:
                self.cpu_s[name] += thread_time() - started_at
                self.calls[name] += 1

        return call


def clock_costs(repeats: int = 20_000) -> tuple[float, float]:
    """What one timed call adds to the balancer's time, and to the simulator's, in seconds."""

    class Nothing:
        def __getattr__(self, name: str) -> Callable[[], None]:
            return lambda: None

    timed: Any = TimedDecisions(Nothing())  # type: ignore[arg-type]
    started_at = thread_time()
    for _ in range(repeats):
        timed.submit()
    inside_s = timed.cpu_s["submit"]
    return inside_s / repeats, (thread_time() - started_at - inside_s) / repeats


def print_split(nodes: int, requests: int, loads: Sequence[float]) -> None:
    fleet = parse_fleet(write_fleet(nodes), file="fleet.yaml")
    workload = Workload(Mix((MODEL,), (1.0,)), requests, rate=10.0)
    us = 1e6 / requests
    inside_s, outside_s = clock_costs()
    print(f"{nodes} nodes, {requests:,} requests; CPU time in µs for each request")
    print(f"{'load':>5}{'all':>8}{'balancer':>10}{'own':>8}{'prepare':>9}{'result':>8}  of the balancer")
    for load in loads:
        started_at = thread_time()
        scaled = scale_to_load(workload, fleet, load)
        prepare_s = thread_time() - started_at
        simulation = Simulation(fleet, scaled, POLICY, max_queue=100_000)
        timed = TimedDecisions(simulation.decisions)
        simulation.decisions = timed  # type: ignore[assignment]
        started_at = thread_time()
        measures = simulation.run()
        run_s = thread_time() - started_at
        started_at = thread_time()
        measures.result()
        result_s = thread_time() - started_at
        calls = sum(timed.calls.values())
        balancer_s = sum(timed.cpu_s.values()) - calls * inside_s
        own_s = run_s - sum(timed.cpu_s.values()) - calls * outside_s
        parts = (f"{name} {(timed.cpu_s[name] - timed.calls[name] * inside_s) * us:.1f}" for name in CALLS)
        whole_s = prepare_s + balancer_s + own_s + result_s
        figures = f"{whole_s * us:>8.1f}{balancer_s * us:>10.1f}{own_s * us:>8.1f}{prepare_s * us:>9.1f}"
        print(f"{load:>5.2f}{figures}{result_s * us:>8.1f}  {', '.join(parts)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="else 1,000,000; with --split 50,000")
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--load", type=float, default=0.8, help="of the command: 0.8 is 80 %% of the fleet's capacity")
    parser.add_argument("--split", action="store_true", help="say where the time goes")
    parser.add_argument("--loads", default="0.5,0.8,0.95", help="of --split")
    parser.add_argument("--check", action="store_true", help="exit 1 if the command needs 180 s of CPU or more")
    given = parser.parse_args()
    if given.split:
        print_split(given.nodes, given.requests or 50_000, [float(load) for load in given.loads.split(",")])
        return 0
    requests = given.requests or 1_000_000
    wall_s, cpu_s, figures = run_command(given.nodes, requests, given.load)
    mean = figures["completion"]["mean"]
    print(
        f"{requests:,} requests over {given.nodes} nodes at {given.load:.0%}: {wall_s:.0f} s, CPU {cpu_s:.0f} s "
        f"({cpu_s / requests * 1e6:.0f} µs a request); mean {mean:.2f} s, lost {figures['lost']}"
    )
    return 1 if given.check and cpu_s >= LIMIT_S else 0


if __name__ == "__main__":
    sys.exit(main())
