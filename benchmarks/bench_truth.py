"""Puts every figure of `gpumesh bench` beside the truth, on real meshes through a real sshd.

    chrt -f 20 python benchmarks/bench_truth.py [CASE …] [--markdown] [--check]

Each case starts stand-in servers (truth_server.py), which log what they really did, and runs the installed `gpumesh
bench run` on a mesh of them. The truth is computed from the servers' logs alone. A figure that cannot be known must be
unknown (``null``), and the case's note must be in the result. ``--markdown`` prints the table of docs/bench.md.
``--check`` exits with 1 if a figure differs by more than 2 % and 5 ms, or is known where it cannot be.

The servers are slow (20 tokens/s), so that the wake-ups of a busy machine are small beside their times. ``chrt -f 20``
keeps other programs from delaying them, but not all: a case that is wrong is measured again, up to ``--tries`` times,
and the output says which try is shown. All cases take about eight minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from truth_server import MODEL, ServedAnswer, ServerSpec
from tunnel_routes import ROOT, child_server

from tests.tunnels.sshd import Sshd

TOLERANCE, TOLERANCE_MS = 0.02, 5.0
TOKENS = 32
SLO_TTFT_MS, SLO_TPOT_MS = 2000.0, 75.0
LONG_PAUSE_MS = 500.0
COLD_S = 0.2  # a longer load was not that of a model in memory
MIN_BUSY_SHARE = 0.4  # as in gpumesh/bench/figures/loaded_part.py
LIMIT_S = 180.0  # for one run of `gpumesh bench`


@dataclass(frozen=True)
class Case:
    """``servers`` by the name of the node. ``in_flight``: requests in flight. ``unknown``: the figures that cannot be
    known. ``notes``: parts of the notes that must be in the result."""

    servers: Mapping[str, ServerSpec]
    in_flight: int = 2
    requests: int = 10
    unknown: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    prompt_tokens: int = 32


def one(**changes: Any) -> dict[str, ServerSpec]:
    return {"alpha": ServerSpec(**{"slots": 2, **changes})}


SERVER_RATES = frozenset({"server tok/s p50", "alpha tok/s", "alpha prefill tok/s", "alpha queue ms", "alpha load ms"})
OUTPUT = frozenset({"output tok/s", "tok/s, slots busy", "total tok/s", "tokens", "alpha tokens"})
PROMPTS = frozenset({"total tok/s", "prompt tokens", "alpha prefill tok/s"})
TPOT = frozenset({"TPOT p50", "TPOT mean"})
CASES = {
    "1 slot": Case(one(slots=1), in_flight=1),
    "2 slots": Case(one(slots=2), in_flight=2),
    "4 slots": Case(one(slots=4), in_flight=4, requests=16),
    "2 slots, 4 in flight": Case(one(slots=2), in_flight=4, requests=16),
    "unequal nodes": Case(
        {"alpha": ServerSpec(slots=2), "beta": ServerSpec(tokens_per_s=10.0, prefill_tokens_per_s=50.0)},
        in_flight=3,
        requests=18,
    ),
    "cold starts": Case(one(cold_every=4, cold_s=1.5), notes=("2 answers of alpha waited for a load of the model",)),
    "stalls": Case(one(stall_every=3, stall_s=1.0)),
    "held up on the way": Case(one(hold_every=4, hold_s=1.0), notes=("held up on the way",)),
    "thinking": Case(one(thinking=16)),
    "hidden thinking": Case(one(hidden=16), notes=("tokens that it did not send",)),
    "hidden thinking, no durations": Case(
        one(hidden=16, api="openai"), unknown=SERVER_RATES | TPOT, notes=("fewer pieces than tokens",)
    ),
    "4 tokens a frame": Case(one(per_piece=4), notes=("several tokens came in a piece",)),
    "4 a frame, no durations": Case(
        one(per_piece=4, api="openai"), unknown=SERVER_RATES, notes=("several tokens came in a piece",)
    ),
    "no durations": Case(one(api="openai"), unknown=SERVER_RATES, notes=("did not say how long it generated all",)),
    "no prompt_eval_count": Case(
        one(without=("prompt_eval_count",)), unknown=PROMPTS, notes=("no count of the prompt's tokens of all",)
    ),
    "no usage": Case(
        one(api="openai", without=("usage",)),
        unknown=SERVER_RATES | OUTPUT | PROMPTS | TPOT,
        notes=("no believable count of the tokens of all", "no count of the prompt's tokens of all"),
    ),
    "no eval_duration": Case(
        one(without=("eval_duration",)),
        unknown=SERVER_RATES - {"alpha prefill tok/s", "alpha load ms"},
        notes=("did not say how long it generated all",),
    ),
    "64 million tok/s": Case(one(absurd=True), unknown=SERVER_RATES, notes=("contradict the times measured here",)),
    "clock twice as fast": Case(one(clock=2.0), unknown=SERVER_RATES, notes=("contradict the times measured here",)),
    "clock half as fast": Case(one(clock=0.5), unknown=SERVER_RATES, notes=("contradict the times measured here",)),
    "short answers": Case(one(stop_after=20), notes=("shorter than asked for: all 10 answers (10 ended",)),
    "prompt cut": Case(one(context=60), prompt_tokens=128, notes=("fewer tokens than words in prompts of all",)),
}


@dataclass
class Comparison:
    """A figure of a case beside the truth. ``unknown``: it cannot be known."""

    figure: str
    truth: float
    measured: float | None
    unknown: bool = False

    @property
    def difference(self) -> float | None:
        """Measured ÷ truth - 1."""
        return None if self.measured is None or not self.truth else self.measured / self.truth - 1.0

    @property
    def is_time(self) -> bool:
        """Whether it is a time in ms."""
        return not any(unit in self.figure for unit in ("/s", "tokens", "answers", "starts"))

    @property
    def is_right(self) -> bool:
        if self.unknown or self.measured is None:
            return self.unknown and self.measured is None
        error = abs(self.measured - self.truth)
        return error <= max(TOLERANCE * abs(self.truth), TOLERANCE_MS if self.is_time else 0.0)


@dataclass
class CaseResult:
    comparisons: list[Comparison] = field(default_factory=list)
    missing_notes: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not self.missing_notes and all(comparison.is_right for comparison in self.comparisons)


# -- the truth --------------------------------------------------------------------------------------------------------


def sent_times(answers: Sequence[ServedAnswer], in_flight: int) -> list[float]:
    """When each request, in the order of their arrival, was sent: in a closed loop, when an answer ended. The first
    ones were sent at the start, about when the first of them arrived."""
    ends = sorted(answer.ended_at for answer in answers)
    start = min(answer.received_at for answer in answers)
    return [start if index < in_flight else ends[index - in_flight] for index in range(len(answers))]


def true_figures(by_node: Mapping[str, Sequence[ServedAnswer]], in_flight: int) -> dict[str, float]:
    """Every figure of the stage, from the servers' logs."""
    answers = sorted((a for node in by_node.values() for a in node), key=lambda answer: answer.received_at)
    sent = sent_times(answers, in_flight)
    ttft = [(answer.sent_at[0] - sent_at) * 1e3 for answer, sent_at in zip(answers, sent, strict=True)]
    end_to_end = [(answer.ended_at - sent_at) * 1e3 for answer, sent_at in zip(answers, sent, strict=True)]
    tpot = [true_tpot_ms(answer) for answer in answers]
    gaps = [
        (after - before) * 1e3
        for answer in answers
        for before, after in zip(answer.sent_at, answer.sent_at[1:], strict=False)
    ]
    seconds = max(answer.ended_at for answer in answers) - min(sent)
    tokens = sum(len(answer.generated_at) for answer in answers)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    good = sum(a <= SLO_TTFT_MS and b <= SLO_TPOT_MS for a, b in zip(ttft, tpot, strict=True))
    figures = {
        "TTFT p50": p50(ttft),
        "TTFT mean": mean(ttft),
        "TPOT p50": p50(tpot),
        "TPOT mean": mean(tpot),
        "ITL mean": mean(gaps),
        "ITL p90": nearest_rank(gaps, 0.9),
        "end-to-end p50": p50(end_to_end),
        "end-to-end mean": mean(end_to_end),
        "server tok/s p50": p50([server_rate(answer) for answer in answers]),
        "output tok/s": tokens / seconds,
        "tok/s, slots busy": busy_rate(answers, sent, in_flight),
        "total tok/s": (tokens + prompt_tokens) / seconds,
        "requests/s": len(answers) / seconds,
        "goodput requests/s": good / seconds,
        "tokens": tokens,
        "prompt tokens": prompt_tokens,
    }
    if max(gaps) > LONG_PAUSE_MS:  # otherwise the longest gap is a pause of this machine
        figures["ITL max"] = max(gaps)
    for name, served in by_node.items():
        figures |= {
            f"{name} answers": len(served),
            f"{name} tokens": sum(len(answer.generated_at) for answer in served),
            f"{name} tok/s": mean([server_rate(answer) for answer in served]),
            f"{name} prefill tok/s": p50([answer.prompt_tokens / answer.prefill_s for answer in served]),
            f"{name} queue ms": mean([answer.queued_s * 1e3 for answer in served]),
            f"{name} load ms": max(answer.load_s * 1e3 for answer in served),
            f"{name} cold starts": sum(answer.load_s > COLD_S for answer in served),
        }
    return figures


def busy_rate(answers: Sequence[ServedAnswer], sent: Sequence[float], in_flight: int) -> float:
    """The tokens per second that were generated while all slots were busy: from the end of the first round (or from the
    start, if that leaves too little) until the last request was sent."""
    start, end = max(answer.ended_at for answer in answers[:in_flight]), max(sent)
    if end - start < MIN_BUSY_SHARE * (end - min(sent)):
        start = min(sent)
    return sum(start <= at < end for answer in answers for at in answer.generated_at) / (end - start)


def true_tpot_ms(answer: ServedAnswer) -> float:
    return (answer.generated_at[-1] - answer.generated_at[0]) * 1e3 / (len(answer.generated_at) - 1)


def server_rate(answer: ServedAnswer) -> float:
    """As Ollama counts it: all tokens ÷ the time from the first token to the last one."""
    return len(answer.generated_at) / (answer.generated_at[-1] - answer.generated_at[0])


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def p50(values: Sequence[float]) -> float:
    return nearest_rank(values, 0.5)


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The percentile by nearest rank, as in gpumesh."""
    return sorted(values)[math.ceil(len(values) * share - 1e-9) - 1]


def measured_figures(stage: Mapping[str, Any]) -> dict[str, float | None]:
    """The same figures as `gpumesh bench` has measured them, from its JSON."""
    latency, rates = stage["latency"], stage["rates"]
    figures = {
        "TTFT p50": latency["ttft"]["p50"],
        "TTFT mean": latency["ttft"]["mean"],
        "TPOT p50": latency["tpot"]["p50"],
        "TPOT mean": latency["tpot"]["mean"],
        "ITL mean": latency["itl"]["mean"],
        "ITL p90": latency["itl"]["p90"],
        "ITL max": latency["itl"]["max"],
        "end-to-end p50": latency["end_to_end"]["p50"],
        "end-to-end mean": latency["end_to_end"]["mean"],
        "server tok/s p50": rates["server"]["p50"],
        "output tok/s": rates["output_tokens_per_s"],
        "tok/s, slots busy": rates["loaded_tokens_per_s"],
        "total tok/s": rates["total_tokens_per_s"],
        "requests/s": rates["requests_per_s"],
        "goodput requests/s": rates["goodput_per_s"],
        "tokens": stage["output_tokens"],
        "prompt tokens": stage["prompt_tokens"],
    }
    for share in stage["nodes"]:
        figures |= {
            f"{share['node']} answers": share["served"],
            f"{share['node']} tokens": share["output_tokens"],
            f"{share['node']} tok/s": share["server_tokens_per_s"],
            f"{share['node']} prefill tok/s": share["prefill_tokens_per_s"]["p50"],
            f"{share['node']} queue ms": share["wait_ms"]["mean"],
            f"{share['node']} load ms": share["load_ms"]["max"],
            f"{share['node']} cold starts": share["cold_starts"],
        }
    return figures


# -- a case -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running_mesh(case: Case, folder: Path, sshd: Sshd) -> AsyncIterator[Path]:
    """The case's servers, each a node behind the sshd. Yields the mesh.yaml."""
    ssh = {
        "host": "127.0.0.1",
        "port": sshd.port,
        "user": getpass.getuser(),
        "identity_file": str(sshd.identity),
        "known_hosts": str(sshd.known_hosts),
        "agent": False,
    }
    async with AsyncExitStack() as stack:
        nodes = []
        for name, spec in case.servers.items():
            spec_file = folder / f"{name}.json"
            spec_file.write_text(json.dumps(asdict(spec)))
            script = str(Path(__file__).with_name("truth_server.py"))
            server = child_server(sys.executable, script, str(spec_file), str(folder / f"{name}.jsonl"))
            port = await stack.enter_async_context(server)
            nodes.append({"name": name, "ssh": ssh, "backend": {"kind": spec.api, "port": port}})
        file = folder / "mesh.yaml"
        gateway = {"listen": "127.0.0.1:0", "default_model": MODEL}
        file.write_text(json.dumps({"version": 1, "name": "truth", "gateway": gateway, "nodes": nodes}))
        yield file


async def run_bench(case: Case, mesh: Path, folder: Path) -> dict[str, Any]:
    """Runs `gpumesh bench run` and returns its JSON."""
    options = {
        "--scenario": "sweep",
        "-c": case.in_flight,
        "-n": case.requests,
        "--tokens": TOKENS,
        "--prompt-tokens": case.prompt_tokens,
        "--slo-ttft": SLO_TTFT_MS,
        "--slo-tpot": SLO_TPOT_MS,
        "--out": folder / "result",
    }
    arguments = [str(part) for option in options.items() for part in option]
    # Its own folders: what an earlier run has learned of a server with this name must not matter.
    own = {"XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "gpumesh", "--config", str(mesh), "bench", "run", *arguments, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | own,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SystemExit(f"gpumesh bench: exit {process.returncode}\n{err.decode(errors='replace')}")
    document: dict[str, Any] = json.loads(out)
    return document


def read_log(path: Path) -> list[ServedAnswer]:
    return [ServedAnswer(**json.loads(line)) for line in path.read_text().splitlines()]


async def measure_case(case: Case, folder: Path) -> CaseResult:
    """Runs a case, and compares the last stage with the logs of the requests that were last sent."""
    folder.mkdir(mode=0o700)
    async with Sshd(folder / "sshd") as sshd, running_mesh(case, folder, sshd) as mesh:
        document = await run_bench(case, mesh, folder)
    stage = document["stages"][-1]
    logged = [(answer, name) for name in case.servers for answer in read_log(folder / f"{name}.jsonl")]
    logged.sort(key=lambda entry: entry[0].received_at)
    last = logged[-stage["requests"] :]
    by_node = {name: [answer for answer, node in last if node == name] for name in case.servers}
    truth = true_figures({name: answers for name, answers in by_node.items() if answers}, case.in_flight)
    measured = measured_figures(stage)
    result = CaseResult()
    for figure, value in truth.items():
        result.comparisons.append(Comparison(figure, value, measured.get(figure), figure in case.unknown))
    result.missing_notes = [note for note in case.notes if not any(note in found for found in document["notes"])]
    return result


# -- what is printed --------------------------------------------------------------------------------------------------


def print_case(name: str, result: CaseResult) -> None:
    print(f"\n{name}: {'right' if result.is_right else 'WRONG'}")
    for comparison in result.comparisons:
        measured = "unknown" if comparison.measured is None else f"{comparison.measured:,.2f}"
        difference = "" if comparison.difference is None else f"{comparison.difference:+.1%}"
        flag = "" if comparison.is_right else "  WRONG"
        print(f"  {comparison.figure:<22}{comparison.truth:>12,.2f}{measured:>12}{difference:>9}{flag}")
    for note in result.missing_notes:
        print(f"  WRONG: no note with {note!r}")
    sys.stdout.flush()


def print_markdown(results: Mapping[str, CaseResult]) -> None:
    """A row for each case, a column for each figure of all nodes together, and the server's own times of alpha."""
    columns = [comparison.figure for comparison in next(iter(results.values())).comparisons]
    columns = [figure for figure in columns if figure not in ("alpha answers", "alpha tokens", "alpha cold starts")]
    print(f"\n| case | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, result in results.items():
        by_figure = {comparison.figure: comparison for comparison in result.comparisons}
        print(f"| {name} | {' | '.join(format_difference(by_figure[figure]) for figure in columns)} |")


def format_difference(comparison: Comparison) -> str:
    if comparison.measured is None:
        return "unknown"
    if comparison.is_time and abs(comparison.truth) < TOLERANCE_MS:
        return f"{comparison.measured - comparison.truth:+.1f} ms"
    return "" if comparison.difference is None else f"{comparison.difference:+.1%}"


async def measure(names: Sequence[str], tries: int) -> dict[str, CaseResult]:
    """The result of each case: that of the first try that is right, else of the last one."""
    results = {}
    # Short, because a runtime folder holds Unix sockets, whose paths are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        for number, name in enumerate(names):
            for attempt in range(1, tries + 1):
                results[name] = await measure_case(CASES[name], Path(folder) / f"{number}-{attempt}")
                print_case(f"{name} (try {attempt})" if attempt > 1 else name, results[name])
                if results[name].is_right:
                    break
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="how often a case that is wrong is measured")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/bench.md, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is wrong")
    given = parser.parse_args()
    results = asyncio.run(measure(given.cases or list(CASES), given.tries))
    if given.markdown:
        print_markdown(results)
    wrong = [name for name, result in results.items() if not result.is_right]
    print(f"\nwrong: {', '.join(wrong) or 'none'} of {len(results)} cases")
    return 1 if given.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
