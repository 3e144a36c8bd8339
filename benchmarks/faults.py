"""Each fault of tests/real/faults.py against a mesh under load: time to notice, time to recover, requests failed.

    sudo python benchmarks/faults.py [--only TEXT ...] [--repeat N] [--outage S] [--json FILE] [--markdown FILE]

A GPU host (OpenSSH's sshd and a stand-in for Ollama in a network namespace, hence root) is reached by both transports
at once; another host stays healthy; clients send requests through the gateway all the time, half of them for streams.
Before each fault the connections have been up for a while (``--settle``).

- noticed: from the fault until the mesh sends the node no more requests
- back: from the fault's end (or from the fault, where the host is healthy again at once) until it gets requests again
- failed: requests that failed or were cut, of all; the other host works, so the goal is 0
- slowest: the longest time that any client waited for its whole answer (0.4 s without a fault)

With ``--repeat`` the worst of all runs is shown. ``--check`` exits 1 unless resets are noticed within 1 s, black holes
within 5 s, and no request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpumesh.daemon.process import async_runner
from tests.real.faults import FAULTS, VICTIMS, FaultResult, InjectedFault, NoticedBy, fault_setup, run_fault

SETTLE_S = 11.0  # longer than lifecycle.RetryTiming.stable_s


async def measure(fault: InjectedFault, settle_s: float) -> list[FaultResult]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime
        async with fault_setup(Path(folder), line=fault.line) as setup:
            await asyncio.sleep(settle_s)
            return await run_fault(setup, fault)


def pick_worst(results: list[FaultResult]) -> FaultResult:
    """The worst figures of several runs of one fault over one transport."""
    noticed = [result.noticed_s for result in results if result.noticed_s is not None]
    recovered = [result.recovered_s for result in results if result.recovered_s is not None]
    return replace(
        results[0],
        noticed_s=max(noticed, default=None),
        recovered_s=max(recovered, default=None),
        answers=sum(result.answers for result in results),
        failures=tuple(failure for result in results for failure in result.failures),
        slowest_s=max(result.slowest_s for result in results),
        same_port=all(result.same_port for result in results),
    )


def list_problems(fault: InjectedFault, results: list[FaultResult]) -> list[str]:
    problem_texts = []
    for result in results:
        subject = f"{fault.name}, {result.transport}"
        if fault.noticed_by is NoticedBy.NOTHING:
            if result.noticed_s is not None:
                problem_texts.append(f"{subject}: taken for a dead host")
        elif result.noticed_s is None or result.noticed_s > fault.goal_s:
            problem_texts.append(f"{subject}: noticed after {result.noticed_s} s, the goal is {fault.goal_s:g} s")
        if not result.same_port:
            problem_texts.append(f"{subject}: another local port")
    failures = results[0].failures  # both transports have the same clients
    if failures:
        problem_texts.append(f"{fault.name}: {len(failures)} requests failed, the first: {failures[0]}")
    return problem_texts


def format_table(rows: list[tuple[InjectedFault, list[FaultResult]]]) -> str:
    head = ["fault", *(f"{transport}: {what}" for transport in VICTIMS for what in ("noticed", "back"))]
    lines = ["| " + " | ".join([*head, "failed", "slowest"]) + " |", "|---" * (len(head) + 2) + "|"]
    for fault, results in rows:
        cells = [fault.name]
        for result in results:
            cells += [_seconds(result.noticed_s), _seconds(result.recovered_s)]
        cells += [f"{len(results[0].failures)} of {results[0].answers}", _seconds(results[0].slowest_s)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def select_faults(only: list[str], outage_s: float) -> list[InjectedFault]:
    faults = [
        replace(fault, name=f"outage of {outage_s:g} s", lasts_s=outage_s) if fault.name == "outage" else fault
        for fault in FAULTS
    ]
    return [fault for fault in faults if not only or any(text in fault.name for text in only)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="faults whose name has one of these")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--outage", type=float, default=30.0, metavar="S")
    parser.add_argument("--settle", type=float, default=SETTLE_S, metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    rows = []
    problem_texts = []
    for fault in select_faults(arguments.only, arguments.outage):
        runs = [async_runner.run(measure(fault, arguments.settle)) for _ in range(arguments.repeat)]
        results = [pick_worst(list(same_node)) for same_node in zip(*runs, strict=True)]
        rows.append((fault, results))
        problem_texts += list_problems(fault, results)
        print(format_table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    print(format_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for _, results in rows for result in results], indent=2))
    if arguments.markdown:
        arguments.markdown.write_text(format_table(rows) + "\n")
    for problem in problem_texts:
        print(problem, file=sys.stderr)
    return 1 if problem_texts and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
