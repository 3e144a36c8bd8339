"""How long a command takes to be there: its help beside a Python that does nothing, and what asks a running mesh.

    python benchmarks/startup.py [--rounds N] [--json] [--check]

Rounds are interleaved, so that what else the machine does falls on all commands alike. The mesh is of three simulated
hosts, in the background. ``--check`` exits 1 unless, at the median, help and version come within 150 ms of the bare
Python, and `status` within 300 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpumesh.lab import profile
from gpumesh.lab.lab import Lab

BARE = "python -c pass"
ABOVE_BARE_MS = {"gpumesh --help": 150.0, "gpumesh --version": 150.0, "gpumesh run --help": 150.0}
ALTOGETHER_MS = {"gpumesh status": 300.0, "gpumesh status --json": 300.0}
SHOWN_ONLY = ("gpumesh env", "gpumesh run -o num_predict=1 Hello")
GPUMESH = Path(sys.executable).with_name("gpumesh")


def command(name: str) -> list[str]:
    if name == BARE:
        return [sys.executable, "-c", "pass"]
    return [str(GPUMESH), *name.split()[1:]]


def wall_ms(argv: Sequence[str], environment: Mapping[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000


def measure(rounds: int, environment: Mapping[str, str]) -> dict[str, list[float]]:
    """The first round fills the caches of the disk and of Python's compiler, and is left out."""
    times: dict[str, list[float]] = {name: [] for name in (BARE, *ABOVE_BARE_MS, *ALTOGETHER_MS, *SHOWN_ONLY)}
    for number in range(rounds + 1):
        for name, taken in times.items():
            ms = wall_ms(command(name), environment)
            if number:
                taken.append(ms)
    return times


async def on_a_mesh(rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as name:
        folder = Path(name)
        own = {"HOME": name, "XDG_RUNTIME_DIR": name, "GPUMESH_CONFIG": str(folder / "mesh.yaml")}
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **own}
        async with Lab(profile.make_hosts(3, load_s=0.0), folder) as lab:
            lab.write_config(folder / "mesh.yaml", listen="127.0.0.1:0", default_model="qwen2.5:7b")
            subprocess.run([GPUMESH, "--quiet", "up", "-d"], env=environment, check=True)
            try:
                return await asyncio.to_thread(measure, rounds, environment)
            finally:
                subprocess.run([GPUMESH, "--quiet", "down"], env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    times = asyncio.run(on_a_mesh(arguments.rounds))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    limits = {name: medians[BARE] + more for name, more in ABOVE_BARE_MS.items()} | ALTOGETHER_MS
    if arguments.json:
        print(json.dumps({"median_ms": medians, "limit_ms": limits, "times_ms": times}))
    else:
        print(f"{'command':36} {'median ms':>10} {'fastest':>8} {'slowest':>8} {'limit':>7}")
        for name, taken in times.items():
            limit = f"{limits[name]:7.0f}" if name in limits else ""
            print(f"{name:36} {medians[name]:10.1f} {min(taken):8.1f} {max(taken):8.1f} {limit}".rstrip())
    missed = [name for name, limit in limits.items() if medians[name] > limit]
    if arguments.check and missed:
        print(f"too slow: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
