"""Checks the conclusions of `gpumesh bench` on servers whose truth is known: stand-ins of 4 and 2 slots.

    python benchmarks/bench_scale_check.py [--runs N] [--only scale|sweep] [--slots 4,2] [--rates 50,50] [--share S]
        [--max-parallel 0,3] [--same-mesh] [--check]

Each run starts the hosts (the lab's, with real SSH) and `gpumesh up` anew, and then runs `gpumesh bench run --json`, as
a person does straight after `up`. The mesh has learned nothing by then. With ``--same-mesh`` all runs use one mesh.

``--rates`` are the tokens/s of a slot of each host. ``--share``: how much longer each neighbour makes a token.
``--max-parallel``: what mesh.yaml says of each node, true or not; 0: nothing.

- scale: the capacities that were found, and the efficiency. The truth is the number of slots, and 100 %: each stand-in
  gives each of its slots the same rate whatever the others do
- sweep: the rate at each level, and the knee. The truth rises up to the sum of the slots, and is flat past it
- truth: the rate that a stand-in can give, from its profile: slots * tokens ÷ (prefill + tokens ÷ rate)

``--check`` exits 1 unless each efficiency is from 97 to 103 %, the capacities are the slots, the knee is at the sum of
the slots, and no level of the sweep is more than 2 % below a lower one. Rates are low, so a busy machine can keep up;
still run it with a raised priority (``chrt -f 20``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gateway import free_port, program  # noqa: E402

from gpumesh.lab.lab import Lab  # noqa: E402
from gpumesh.lab.profile import QWEN_7B, make_host  # noqa: E402

NAMES = ("alpha", "beta", "gamma", "delta")
PREFILL_TOKENS_PER_S = 3000.0
LEAST, MOST = 0.97, 1.03
MAX_DIP = 0.02


@dataclass(frozen=True)
class Setup:
    """The hosts; the lists have an entry for each of them."""

    slots: list[int]
    rates: list[float]
    share: float
    max_parallel: list[int]


@contextlib.asynccontextmanager
async def mesh(setup: Setup, folder: Path) -> AsyncIterator[tuple[Path, dict[str, str]]]:
    """Hosts and a mesh, both new. Yields the mesh.yaml and the environment of commands that shall find the mesh."""
    folder.mkdir(mode=0o700)
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    hosts = [
        make_host(
            name,
            slots=count,
            tokens_per_s=rate,
            prefill_tokens_per_s=PREFILL_TOKENS_PER_S,
            models=(QWEN_7B,),
            share=setup.share,
        )
        for name, count, rate in zip(NAMES, setup.slots, setup.rates, strict=False)
    ]
    environment = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime), "PYTHONPATH": str(ROOT)}
    async with Lab(hosts, folder) as lab:
        port = free_port()
        nodes = [host.node_entry() for host in lab.hosts.values()]
        for node, parallel in zip(nodes, setup.max_parallel, strict=False):
            if parallel:
                node["backend"]["max_parallel"] = parallel
        file = lab.write_config(
            folder / "mesh.yaml", listen=f"127.0.0.1:{port}", default_model=QWEN_7B.name, nodes=nodes
        )
        argv = (sys.executable, "-P", "-m", "gpumesh", "--config", str(file), "--quiet", "up")
        async with program(*argv, port=port, folder=folder, **environment):
            yield file, environment


async def bench(scenario: str, file: Path, environment: dict[str, str], *options: str) -> dict[str, Any]:
    """The result of `gpumesh bench run`, as JSON."""
    argv = (sys.executable, "-P", "-m", "gpumesh", "--config", str(file), "bench", "run", "--scenario", scenario)
    process = await asyncio.create_subprocess_exec(
        *argv,
        *("--json", *options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"bench run ended with {process.returncode}")
    result: dict[str, Any] = json.loads(out)
    return result


def find_scale_faults(result: dict[str, Any], slots: Sequence[int]) -> Iterator[str]:
    """Prints a result of ``scale``, and yields what is wrong with it."""
    scaling = result["scaling"]
    found = [capacity["parallel"] for capacity in result["capacity"]]
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in scaling["nodes"])
    print(f"    capacity {found}; alone {rates}; mesh {scaling['mesh_tokens_per_s']:.1f} tok/s", end="")
    print(f"; efficiency {scaling['efficiency']:.1%}")
    for loss in scaling["losses"]:
        parts = (f"{part} {loss[f'{part}_tokens_per_s']:+.1f}" for part in ("starved", "slowed", "swapped"))
        print(f"      {loss['node']}: busy {loss['busy']:.2f} of {loss['slots']:.2f}; lost tok/s: {', '.join(parts)}")
    if found != list(slots):
        yield f"the capacities are {found}, not {list(slots)}"
    if not LEAST <= scaling["efficiency"] <= MOST:
        yield f"the efficiency is {scaling['efficiency']:.1%} ({scaling['explanation']})"


def find_sweep_faults(result: dict[str, Any], slots: Sequence[int], truth: float) -> Iterator[str]:
    """Prints a result of ``sweep``, and yields what is wrong with it. ``truth``: tokens/s of one slot."""
    highest = 0.0
    for stage in result["stages"]:
        level, rate = stage["concurrency"], stage["rates"]["loaded_tokens_per_s"]
        true_rate = truth * min(level, sum(slots))
        print(
            f"    {level:>3} in flight: {rate:7.1f} tok/s of {true_rate:7.1f} ({rate / true_rate:.1%}),"
            f" whole stage {stage['rates']['output_tokens_per_s']:7.1f}, TTFT {stage['latency']['ttft']['p50']:.0f} ms"
        )
        if rate < highest * (1 - MAX_DIP):
            yield f"{level} in flight give {rate:.1f} tok/s, a lower level {highest:.1f}"
        highest = max(highest, rate)
    print(f"    knee: {result['knee']['text']}; {result['knee']['goodput_text']}")
    if result["knee"]["level"] != sum(slots):
        yield f"the knee is at {result['knee']['level']}, not at {sum(slots)}"


def slot_rate(result: dict[str, Any], rate: float) -> float:
    """The true tokens/s of a busy slot: reading the prompt, then the tokens at the stand-in's rate."""
    stage = result["stages"][0]
    prompt_tokens, tokens = (stage[f"{kind}_tokens"] / stage["served"] for kind in ("prompt", "output"))
    return float(tokens / (prompt_tokens / PREFILL_TOKENS_PER_S + tokens / rate))


async def check(
    runs: int, scenarios: Sequence[str], setup: Setup, *, same_mesh: bool, results: Path | None
) -> list[str]:
    """Runs each scenario ``runs`` times, and returns what was wrong."""
    faults: list[str] = []
    jobs = [(scenario, number) for scenario in scenarios for number in range(1, runs + 1)]
    with tempfile.TemporaryDirectory(prefix="gm-") as name:
        async with contextlib.AsyncExitStack() as stack:
            kept = await stack.enter_async_context(mesh(setup, Path(name) / "kept")) if same_mesh else None
            for scenario, number in jobs:
                began_at = time.monotonic()
                options = () if results is None else ("--out", str(results / f"{scenario}{number}"))
                if kept is not None:
                    result = await bench(scenario, *kept, *options)
                else:
                    async with mesh(setup, Path(name) / f"{scenario}{number}") as (file, environment):
                        result = await bench(scenario, file, environment, *options)
                print(f"  {scenario} {number} of {runs}, {time.monotonic() - began_at:.0f} s")
                if scenario == "scale":
                    found = find_scale_faults(result, setup.slots)
                else:
                    found = find_sweep_faults(result, setup.slots, slot_rate(result, setup.rates[0]))
                faults += [f"{scenario} {number}: {fault}" for fault in found]
                for note in result["notes"]:
                    print(f"      note: {note}")
    return faults


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("scale", "sweep"))
    parser.add_argument("--slots", type=numbers, default=[4, 2])
    parser.add_argument("--rates", type=numbers, default=[50] * len(NAMES))
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--max-parallel", type=numbers, default=[])
    parser.add_argument("--same-mesh", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the results of all runs there")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    scenarios = [given.only] if given.only else ["scale", "sweep"]
    setup = Setup(given.slots, [float(rate) for rate in given.rates], given.share, given.max_parallel)
    faults = asyncio.run(check(given.runs, scenarios, setup, same_mesh=given.same_mesh, results=given.keep))
    for fault in faults:
        print(f"WRONG: {fault}")
    return 1 if given.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
