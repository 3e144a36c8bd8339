"""Checks the verdicts of `gpumesh bench compare`: pairs of equal results, and pairs with slower decoding.

    python benchmarks/bench_compare_check.py [--only simulated|lab] [--pairs 20] [--repeat 6] [-n 40] [--check]
    python benchmarks/bench_compare_check.py --only simulated --table          which repeats and requests it takes

- simulated: made-up records (tests/bench/comparison/simulated_runs.py), which differ from run to run as real hosts do;
  ``--pauses 0.1``: in one of ten runs the machine pauses, too
- lab: real runs of `gpumesh bench run --repeat` on two meshes of the lab's stand-ins, of which the second one decodes
  more slowly. Their results are measured in turn, so that what changes with time reaches both. About 15 minutes

Each part counts the pairs of equal results that have any verdict (each is false), and for each figure that slower
decoding touches the pairs in which it was found. ``--check`` exits 1 unless at most one pair has a false verdict and
each figure is found in nine of ten pairs. The lab's part needs a machine that is not busy with other work: run it with
a raised priority (``chrt -f 20``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gateway import free_port, program  # noqa: E402

from gpumesh.bench.comparison.compare import Comparison, DifferenceVerdict, compare  # noqa: E402
from gpumesh.bench.results.result import BenchResult, result_from_json  # noqa: E402
from gpumesh.lab.lab import Lab  # noqa: E402
from gpumesh.lab.profile import QWEN_7B, make_host  # noqa: E402
from tests.bench.comparison.simulated_runs import DECODE_FIGURES, Noise, false_verdicts, make_result  # noqa: E402

RATE = 50.0  # tokens/s of a slot of the lab's stand-ins
SLOTS = 2  # of each of the lab's two nodes
FOUND_SHARE = 0.9


@dataclass
class Tally:
    """What the pairs of one part gave. ``found``: by stage and figure, in how many pairs slower decoding was found."""

    pairs: int = 0
    false_pairs: int = 0
    false_figures: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)

    def add(self, equal: Comparison, slower: Comparison) -> None:
        """Counts a pair of equal results, and a pair of which the second one is slower."""
        self.pairs += 1
        false = false_verdicts(equal)
        self.false_pairs += bool(false)
        self.false_figures.update(f"{one.stage}, {one.figure} ({one.ratio:.3f})" for one in false)
        for difference in slower.differences:
            if difference.figure in DECODE_FIGURES:
                label = f"{difference.stage}, {difference.figure}"
                self.figures[label] += 1
                self.found[label] += difference.verdict is DifferenceVerdict.WORSE

    def show(self) -> None:
        print(f"  equal results: {self.false_pairs} of {self.pairs} pairs with a false verdict", end="")
        print(f": {', '.join(self.false_figures)}" if self.false_figures else "")
        for label, count in self.figures.items():
            print(f"  slower decoding, {label}: found in {self.found[label]} of {count}")

    def find_faults(self) -> Iterable[str]:
        if self.false_pairs > 1:
            yield f"{self.false_pairs} pairs of equal results have a false verdict"
        for label, count in self.figures.items():
            if self.found[label] < FOUND_SHARE * count:
                yield f"{label}: slower decoding is found in {self.found[label]} of {count} pairs"


def check_simulated(pairs: int, repeat: int, count: int, slower: float, noise: Noise) -> Tally:
    """The pairs of made-up results, with a fixed seed."""
    rng = random.Random(16)
    tally = Tally()
    for _ in range(pairs):
        before, same, after = (
            make_result(rng, repeat=repeat, count=count, slower=factor, noise=noise) for factor in (1.0, 1.0, slower)
        )
        tally.add(compare(before, same), compare(before, after))
    return tally


def print_table(pairs: int, slower: float, noise: Noise) -> None:
    """How many pairs have a false verdict, and in how many the least found figure is found, by repeats and requests."""
    print(f"{'runs':>5} {'requests':>8}   false pairs   found in every figure   least found figure")
    for repeat in (1, 3, 5, 6, 8):
        for count in (10, 20, 40):
            tally = check_simulated(pairs, repeat, count, slower, noise)
            label = min(tally.figures, key=lambda one: tally.found[one])
            least = f"{label}: {tally.found[label]} of {pairs}"
            average = sum(tally.found.values()) / sum(tally.figures.values())
            print(f"{repeat:>5} {count:>8} {tally.false_pairs:>6} of {pairs}  {average:>15.0%}           {least}")


@contextlib.asynccontextmanager
async def mesh(rate: float, folder: Path) -> AsyncIterator[tuple[Path, dict[str, str]]]:
    """Hosts and a mesh. Yields the mesh.yaml, and the environment of commands that shall find the mesh."""
    folder.mkdir(mode=0o700)
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    hosts = [make_host(name, slots=SLOTS, tokens_per_s=rate, models=(QWEN_7B,)) for name in ("alpha", "beta")]
    environment = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime), "PYTHONPATH": str(ROOT)}
    async with Lab(hosts, folder) as lab:
        port = free_port()
        nodes = [host.node_entry() for host in lab.hosts.values()]
        for node in nodes:
            node["backend"]["max_parallel"] = SLOTS
        listen = f"127.0.0.1:{port}"
        file = lab.write_config(folder / "mesh.yaml", listen=listen, default_model=QWEN_7B.name, nodes=nodes)
        argv = (sys.executable, "-P", "-m", "gpumesh", "--config", str(file), "--quiet", "up")
        async with program(*argv, port=port, folder=folder, **environment):
            yield file, environment


async def measure(file: Path, environment: dict[str, str], repeat: int, count: int) -> BenchResult:
    """The result of `gpumesh bench run --repeat`."""
    argv = (sys.executable, "-P", "-m", "gpumesh", "--config", str(file), "--quiet", "bench", "run", "--json")
    options = ("--scenario", "load", "-c", str(2 * SLOTS), "-n", str(count), "--tokens", "32")
    process = await asyncio.create_subprocess_exec(
        *argv,
        *(*options, "--repeat", str(repeat)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"bench run ended with {process.returncode}")
    return result_from_json(json.loads(out))


async def check_lab(pairs: int, repeat: int, count: int, slower: float) -> Tally:
    """The pairs of measured results. Neighbours of the same mesh are a pair of equal results."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="gm-") as name:
        async with (
            mesh(RATE, Path(name) / "before") as before_mesh,
            mesh(RATE / slower, Path(name) / "after") as after_mesh,
        ):
            before = await measure(*before_mesh, repeat, count)
            for number in range(1, pairs + 1):
                began_at = time.monotonic()
                same = await measure(*before_mesh, repeat, count)
                after = await measure(*after_mesh, repeat, count)
                tally.add(compare(before, same), compare(same, after))
                print(f"  pair {number} of {pairs}, {time.monotonic() - began_at:.0f} s", flush=True)
                for stage in same.stages:
                    print("   ", spread_text(same, stage.name), flush=True)
                before = same
    return tally


def spread_text(result: BenchResult, stage_name: str) -> str:
    """How much the figures of a stage differ between the runs of a result: half the 95 % interval, in percent."""
    (stage,) = (stage for stage in result.stages if stage.name == stage_name)
    parts = []
    for label, sample in (
        ("ttft", stage.latency.ttft),
        ("tpot", stage.latency.tpot),
        ("e2e", stage.latency.end_to_end),
    ):
        if sample.p50 and sample.p50_low and sample.p50_high:
            parts.append(f"{label} {sample.p50:.1f} ms ± {(sample.p50_high / sample.p50_low - 1) * 50:.1f} %")
    interval = stage.intervals.loaded_tokens_per_s
    if interval is not None:
        rate = stage.rates.loaded_tokens_per_s or 0.0
        parts.append(f"{rate:.1f} tok/s ± {(interval.high / interval.low - 1) * 50:.1f} %")
    return f"{stage_name}: {', '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("simulated", "lab"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("-n", type=int, default=40, dest="count", help="requests of a stage (simulated: per node)")
    parser.add_argument("--slower", type=float, default=1.05, help="each token takes so many times as long")
    parser.add_argument("--pauses", type=float, default=0.0, help="simulated: the share of runs with a pause")
    parser.add_argument("--table", action="store_true", help="simulated: by repeats and requests")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    noise = Noise(bad_runs=given.pauses)
    if given.table:
        print_table(given.pairs, given.slower, noise)
        return 0
    sizes = (given.pairs, given.repeat, given.count, given.slower)
    faults: list[str] = []
    for part in [given.only] if given.only else ["simulated", "lab"]:
        print(f"{part}: {given.pairs} pairs, {given.repeat} runs, {given.count} requests, {given.slower:g} x as slow")
        tally = check_simulated(*sizes, noise) if part == "simulated" else asyncio.run(check_lab(*sizes))
        tally.show()
        faults += [f"{part}: {fault}" for fault in tally.find_faults()]
    for fault in faults:
        print(f"WRONG: {fault}")
    return 1 if given.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
