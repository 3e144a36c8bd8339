"""Measures how long commands take to start: their help, compared to a Python that does nothing, and `status` of a mesh.

    python benchmarks/startup.py [--rounds N] [--json] [--check]

Rounds are interleaved, so that other load of the machine affects all commands alike. The mesh has three simulated
hosts and runs in the background. ``--check`` exits 1 unless, at the median, help and version take at most 150 ms more
than the bare Python, and `status` at most 300 ms.
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

from gpumesh.lab import demo_hosts
from gpumesh.lab.lab import Lab

BARE = "python -c pass"
ABOVE_BARE_MS = {"gpumesh --help": 150.0, "gpumesh --version": 150.0, "gpumesh run --help": 150.0}
TOTAL_MS = {"gpumesh status": 300.0, "gpumesh status --json": 300.0}
WITHOUT_LIMIT = ("gpumesh env", "gpumesh run -o num_predict=1 Hello")
GPUMESH = Path(sys.executable).with_name("gpumesh")


def command(name: str) -> list[str]:
    if name == BARE:
        return [sys.executable, "-c", "pass"]
    return [str(GPUMESH), *name.split()[1:]]


def wall_ms(argv: Sequence[str], environment: Mapping[str, str]) -> float:
    started_at = time.perf_counter()
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - started_at) * 1000


def measure(rounds: int, environment: Mapping[str, str]) -> dict[str, list[float]]:
    """The times of each command (ms). The first round is left out: it fills the caches of the disk and of Python."""
    times: dict[str, list[float]] = {name: [] for name in (BARE, *ABOVE_BARE_MS, *TOTAL_MS, *WITHOUT_LIMIT)}
    for number in range(rounds + 1):
        for name, times_ms in times.items():
            ms = wall_ms(command(name), environment)
            if number:
                times_ms.append(ms)
    return times


async def measure_on_mesh(rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as name:
        folder = Path(name)
        private = {"HOME": name, "XDG_RUNTIME_DIR": name, "GPUMESH_CONFIG": str(folder / "mesh.yaml")}
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **private}
        async with Lab(demo_hosts.make_hosts(3, load_s=0.0), folder) as lab:
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
    times = asyncio.run(measure_on_mesh(arguments.rounds))
    medians = {name: statistics.median(times_ms) for name, times_ms in times.items()}
    limits = {name: medians[BARE] + more for name, more in ABOVE_BARE_MS.items()} | TOTAL_MS
    if arguments.json:
        print(json.dumps({"median_ms": medians, "limit_ms": limits, "times_ms": times}))
    else:
        print(f"{'command':36} {'median ms':>10} {'fastest':>8} {'slowest':>8} {'limit':>7}")
        for name, times_ms in times.items():
            limit = f"{limits[name]:7.0f}" if name in limits else ""
            print(f"{name:36} {medians[name]:10.1f} {min(times_ms):8.1f} {max(times_ms):8.1f} {limit}".rstrip())
    too_slow = [name for name, limit in limits.items() if medians[name] > limit]
    if arguments.check and too_slow:
        print(f"too slow: {', '.join(too_slow)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
