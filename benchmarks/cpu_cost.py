"""Measures the cost of a request and of a streamed token: CPU time of the whole program (user and system) ÷ count.

    python benchmarks/cpu_cost.py [--rounds N] [--beside CHECKOUT]

CPU time depends less on other load of the machine than wall time does, so small differences show. Each program is
measured in turn, round after round, in a new random order each time. The figure is the median over the rounds. Only
figures of one run can be compared.

nginx is measured if it is installed. `copy` is a proxy in Python that only copies bytes (`copying_proxy.py`): no
gateway on uvloop can cost less. ``--beside`` measures another checkout of gpumesh in the same run: the code before a
change, for example a `git worktree` of the commit on which the change is based.

- request: answers in one piece, 32 in flight; the stand-in answers at once
- token: 128 streams of 100 tokens/s, each token in a write of its own; the cost of the streams' requests is included
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from gateway import HERE, NGINX, PATH, client, direct_node, free_port, gpumesh, program, stand_in

STREAMS, TOKENS = 128, 200


def cpu_s(group: int) -> float:
    """CPU seconds that the living processes of a process group have used, and those of their children that ended."""
    ticks = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


async def cost_us(kind: str, port: int, group: int) -> float:
    """Microseconds for each request, or for each token."""
    before = cpu_s(group)
    if kind == "request":
        figures = await client("throughput", port, "-n", "32", "--seconds", "3")
        count = figures["answered"]
    else:
        figures = await client("streams", port, "-n", str(STREAMS), "--tokens", str(TOKENS), "--spread", "0.5")
        count = STREAMS * TOKENS
    if figures["errors"]:
        raise SystemExit(f"{figures['errors']:.0f} errors on port {port}: this run measures nothing")
    return (cpu_s(group) - before) / count * 1e6


async def measure(rounds: int, beside: Path | None) -> dict[str, dict[str, list[float]]]:
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpumesh-bench-")))
        target = await stack.enter_async_context(stand_in())
        programs: dict[str, tuple[int, int]] = {}
        nodes = [direct_node("one", target)]
        programs["gpumesh"] = await stack.enter_async_context(gpumesh(nodes, folder, "here"))
        if beside is not None:
            started = gpumesh(nodes, folder, "beside", checkout=beside.resolve())
            programs["beside"] = await stack.enter_async_context(started)
        port = free_port()
        argv = (sys.executable, str(HERE / "copying_proxy.py"), str(port), str(target))
        process = await stack.enter_async_context(program(*argv, port=port, folder=folder))
        programs["copy"] = (port, process.pid)
        nginx = shutil.which("nginx", path=PATH)
        if nginx is not None:
            port, file = free_port(), folder / "nginx.conf"
            file.write_text(NGINX.format(port=port, target=target, folder=folder))
            process = await stack.enter_async_context(program(nginx, "-c", str(file), port=port, folder=folder))
            programs["nginx"] = (port, process.pid)
        costs: dict[str, dict[str, list[float]]] = {name: {} for name in programs}
        order = list(programs.items())
        for _ in range(rounds):
            random.shuffle(
                order
            )  # each place in the order has its own bias: which program ran before, how warm the CPU is
            for name, (port, group) in order:
                for kind in ("request", "token"):
                    costs[name].setdefault(kind, []).append(await cost_us(kind, port, group))
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout of gpumesh")
    given = parser.parse_args()
    costs = asyncio.run(measure(given.rounds, given.beside))
    print(f"{'CPU, us':<12}{'a request':>12}{'(least-most)':>16}{'a token':>12}{'(least-most)':>16}")
    for name, kinds in costs.items():
        cells = [(statistics.median(kinds[kind]), min(kinds[kind]), max(kinds[kind])) for kind in ("request", "token")]
        print(f"{name:<12}" + "".join(f"{mid:>12.1f}{f'({low:.1f}-{high:.1f})':>16}" for mid, low, high in cells))
    if "beside" in costs:
        for kind in ("request", "token"):
            ratio = statistics.median(costs["gpumesh"][kind]) / statistics.median(costs["beside"][kind])
            print(f"a {kind}: {ratio:.3f} x the other checkout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
