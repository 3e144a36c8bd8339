"""A connection is killed and recovers many times: does a tunnel that runs for months leak?

    python benchmarks/cycles.py [--cycles N] [--warm-up N] [--transport NAME] [--json] [--check]

A supervised tunnel over a real sshd is used by four connections and a command while sshd's session child is killed
(kill -9); it comes back, and so on. Open file descriptors, threads, child processes and memory of the mesh's process
and of the zygote at the end are compared with those after the warm-up. ``--check`` exits 1 unless the first three are
the same and memory is within 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpumesh.topology import TransportKind
from tests.real.cycles import CycleReport, run_cycles
from tests.real.process_resources import ProcessResources

MEMORY_SHARE = 0.02


def measure(transport: TransportKind, cycles: int, warm_up: int) -> CycleReport:
    def progress(done: int) -> None:
        if sys.stderr.isatty() or done % 100 == 0:
            print(f"\r{transport}: {done} of {cycles}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime
        result = asyncio.run(
            run_cycles(Path(folder), Path(runtime), transport, cycles=cycles, warm_up=warm_up, progress=progress)
        )
    print(file=sys.stderr)
    return result


def list_problems(result: CycleReport) -> list[str]:
    """The resources that changed between start and end."""
    problem_texts = []
    for process, before, after in (
        ("mesh", result.before.mesh, result.after.mesh),
        ("zygote", result.before.zygote, result.after.zygote),
    ):
        if before.countable != after.countable:
            problem_texts.append(
                f"{result.transport}, {process}: fds, threads, children {before.countable} -> {after.countable}"
            )
        if abs(growth(before, after)) > MEMORY_SHARE:
            problem_texts.append(f"{result.transport}, {process}: memory {growth(before, after):+.1%}")
    if len(result.ports) != 1:
        problem_texts.append(f"{result.transport}: the local port changed: {sorted(result.ports)}")
    if result.leftover_files:
        problem_texts.append(f"{result.transport}: files left: {', '.join(result.leftover_files)}")
    return problem_texts


def growth(before: ProcessResources, after: ProcessResources) -> float:
    return after.rss_kib / before.rss_kib - 1.0


def table(results: list[CycleReport]) -> str:
    rows = [
        "| transport | cycles | process | fds | threads | children | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for process, before, after in (
            ("mesh", result.before.mesh, result.after.mesh),
            ("zygote", result.before.zygote, result.after.zygote),
        ):
            counts = " | ".join(
                f"{was} → {is_now}" for was, is_now in zip(before.countable, after.countable, strict=True)
            )
            memory = f"{before.rss_kib / 1024:.1f} → {after.rss_kib / 1024:.1f} MiB ({growth(before, after):+.1%})"
            rows.append(f"| {result.transport} | {result.count} | {process} | {counts} | {memory} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--transport", action="append", choices=[kind.value for kind in TransportKind])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    transports = arguments.transport or [kind.value for kind in TransportKind]
    results = [measure(TransportKind(name), arguments.cycles, arguments.warm_up) for name in transports]
    if arguments.json:
        print(json.dumps([asdict(result) | {"ports": sorted(result.ports)} for result in results], indent=2))
    else:
        print(table(results))
    problem_texts = [problem for result in results for problem in list_problems(result)]
    for problem in problem_texts:
        print(problem, file=sys.stderr)
    return 1 if problem_texts and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
