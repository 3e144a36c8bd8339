"""Each fault of tests/real/faults.py against a mesh under load: time to notice, time to recover, requests failed.

    sudo python benchmarks/faults.py [--only TEXT ...] [--repeat N] [--outage S] [--json FILE] [--markdown FILE]

A GPU host (OpenSSH's sshd and a stand-in for Ollama in a network namespace, hence root) is reached by both transports
at once; another host stays well; clients ask through the gateway all the time, half of them for streams. Before each
fault the connections are as old as those of a tunnel that has been up for a while (``--settle``).

- noticed: from the fault until the mesh gives the node no more requests
- back: from the fault's end (or, where the host is well again at once, from the fault) until it gets requests again
- failed: requests that failed or were cut, of all; the other host lives, so the goal is 0
- slowest: the longest that any client waited for its whole answer (0.4 s without a fault)

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

from gpumesh.daemon.process import event_loop
from tests.real.faults import FAULTS, VICTIMS, FaultResult, InjectedFault, NoticedBy, fault_setup, run_fault

SETTLE_S = 11.0  # past lifecycle.Timing.stable_s


async def measure(fault: InjectedFault, settle_s: float) -> list[FaultResult]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime
        async with fault_setup(Path(folder), line=fault.line) as stage:
            await asyncio.sleep(settle_s)
            return await run_fault(stage, fault)


def worst(results: list[FaultResult]) -> FaultResult:
    """Of one fault and transport, figure by figure."""
    noticed = [one.noticed_s for one in results if one.noticed_s is not None]
    recovered = [one.recovered_s for one in results if one.recovered_s is not None]
    return replace(
        results[0],
        noticed_s=max(noticed, default=None),
        recovered_s=max(recovered, default=None),
        answers=sum(one.answers for one in results),
        failures=tuple(failure for one in results for failure in one.failures),
        slowest_s=max(one.slowest_s for one in results),
        same_port=all(one.same_port for one in results),
    )


def problems(fault: InjectedFault, results: list[FaultResult]) -> list[str]:
    found = []
    for one in results:
        what = f"{fault.name}, {one.transport}"
        if fault.noticed_by is NoticedBy.NOBODY:
            if one.noticed_s is not None:
                found.append(f"{what}: taken for a dead host")
        elif one.noticed_s is None or one.noticed_s > fault.goal_s:
            found.append(f"{what}: noticed after {one.noticed_s} s, the goal is {fault.goal_s:g} s")
        if not one.same_port:
            found.append(f"{what}: another local port")
    failures = results[0].failures  # the clients are those of both
    if failures:
        found.append(f"{fault.name}: {len(failures)} requests failed, the first: {failures[0]}")
    return found


def table(rows: list[tuple[InjectedFault, list[FaultResult]]]) -> str:
    head = ["fault", *(f"{transport}: {what}" for transport in VICTIMS for what in ("noticed", "back"))]
    lines = ["| " + " | ".join([*head, "failed", "slowest"]) + " |", "|---" * (len(head) + 2) + "|"]
    for fault, results in rows:
        cells = [fault.name]
        for one in results:
            cells += [_seconds(one.noticed_s), _seconds(one.recovered_s)]
        cells += [f"{len(results[0].failures)} of {results[0].answers}", _seconds(results[0].slowest_s)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def chosen(only: list[str], outage_s: float) -> list[InjectedFault]:
    faults = [
        replace(one, name=f"outage of {outage_s:g} s", lasts_s=outage_s) if one.name == "outage" else one
        for one in FAULTS
    ]
    return [one for one in faults if not only or any(text in one.name for text in only)]


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
    found = []
    for fault in chosen(arguments.only, arguments.outage):
        runs = [event_loop.run(measure(fault, arguments.settle)) for _ in range(arguments.repeat)]
        results = [worst(list(of_one)) for of_one in zip(*runs, strict=True)]
        rows.append((fault, results))
        found += problems(fault, results)
        print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for _, results in rows for one in results], indent=2))
    if arguments.markdown:
        arguments.markdown.write_text(table(rows) + "\n")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
