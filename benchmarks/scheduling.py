"""Compares where the gateway sends requests with the same work routed by hand, on the real gateway.

    python benchmarks/scheduling.py [SCENARIO …] [--seed N] [--beside CHECKOUT] [--json FILE] [--check]

The servers are the lab's stand-ins for Ollama, each in a process of its own; they sleep instead of computing, so two
cores are enough. Each route of a scenario has stand-ins of its own and all routes run at the same time, with the same
work: ``hand`` is a client that knows which node is best and sends to it directly, ``gpumesh`` is ``gpumesh up`` of this
checkout, ``beside`` that of another checkout. Latency counts from the moment at which a request should have been sent.

- mean, p99, ttft: seconds of latency, and the median until the first piece of an answer
- all: seconds from the start until the last answer
- watched: the longest wait of a watched request (the interactive ones, those of the second client)
- loads: models loaded; read: tokens of prompts that were computed, not cached, in % of all
- inside: of the last 50 requests, those that waited inside a server for a slot
- full: answers that had ended before the only node had all its slots in use
- lost: requests without a complete answer; x hand: the scenario's figure ÷ the same figure by hand, the worst of them

A scenario takes 20 to 40 s with a good gateway, and longer with a bad one. `interactive-behind-batch` takes 66 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import uvloop  # noqa: E402
from gateway import gpumesh  # noqa: E402
from lean_client import percentile  # noqa: E402
from scheduling_scenarios import SCENARIOS, Scenario  # noqa: E402
from scheduling_work import Client, Job  # noqa: E402

from gpumesh.lab.lab import Lab  # noqa: E402
from gpumesh.lab.profile import HostProfile, LoggedRequest, SimCounters  # noqa: E402

HAND = "hand"
WAIT_S = 0.05  # a request that waited longer inside a server for a slot has waited


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one route of a scenario (see the module's docstring). ``None``: there is no such figure."""

    requests: int
    lost: int
    mean_s: float
    p99_s: float
    ttft_p50_s: float
    makespan_s: float
    watched_max_s: float | None
    loads: int
    read_share: float
    waited_inside: int
    answers_before_full: int | None
    times_hand: float = 1.0


async def run_scenario(
    scenario: Scenario, seed: int, checkouts: Mapping[str, Path], folder: Path
) -> dict[str, Figures]:
    """The figures of each route: by hand, and through the gateway of each checkout."""
    jobs = scenario.make_jobs(random.Random(seed))
    routes: dict[str, Path | None] = {HAND: None, **checkouts}
    async with contextlib.AsyncExitStack() as stack:
        ready = [
            await stack.enter_async_context(open_route(scenario.hosts, folder / name, checkout))
            for name, checkout in routes.items()
        ]
        results = await asyncio.gather(
            *(
                _run_route(scenario, _hand_jobs(scenario, jobs) if name == HAND else jobs, lab, port)
                for name, (lab, port) in zip(routes, ready, strict=True)
            )
        )
    figures = dict(zip(routes, results, strict=True))
    return {name: replace(row, times_hand=_times_hand(scenario, row, figures[HAND])) for name, row in figures.items()}


def _times_hand(scenario: Scenario, row: Figures, hand: Figures) -> float:
    """How many times the figures by hand the figures of a route are: the worst of the scenario's."""
    return float(max(getattr(row, figure) / getattr(hand, figure) for figure in scenario.figures))


def _find_misses(scenario: Scenario, row: Figures) -> list[str]:
    """The goals that the route misses, as the names of their figures."""
    misses = {name for name, limit in scenario.at_most.items() if not _is_within(getattr(row, name), limit)}
    if row.times_hand > scenario.bound:
        misses.add(" or ".join(scenario.figures))
    if row.lost:
        misses.add("lost")
    return sorted(misses)


def _is_within(value: float | None, limit: float) -> bool:
    """Whether the figure is there and keeps the limit."""
    return value is not None and value <= limit


def _hand_jobs(scenario: Scenario, jobs: list[Job]) -> list[Job]:
    """The jobs that are sent by hand. A millisecond between them keeps them in order."""
    sent = [job for job in jobs if job.watched or not scenario.watched_only]
    return [replace(job, at_s=job.at_s + job.hand_order * 1e-3) for job in sent]


@contextlib.asynccontextmanager
async def open_route(
    hosts: Sequence[HostProfile], folder: Path, checkout: Path | None
) -> AsyncIterator[tuple[Lab, int | None]]:
    """The hosts, and the port of a gateway in front of them (``None`` without a checkout: no gateway)."""
    folder.mkdir(mode=0o700)
    async with Lab(hosts, folder) as lab:
        if checkout is None:
            yield lab, None
            return
        nodes = [host.node_entry() for host in lab.hosts.values()]
        async with gpumesh(nodes, folder, folder.name, checkout=checkout) as (port, _):
            yield lab, port


async def _run_route(scenario: Scenario, jobs: Sequence[Job], lab: Lab, port: int | None) -> Figures:
    """Sends the work to the gateway at ``port``, or by hand to the hosts themselves, and measures."""
    urls = [urlsplit(host.backend_url) for host in lab.hosts.values()]

    def address(job: Job) -> tuple[str, int]:
        url = urls[job.hand]
        return ("127.0.0.1", port) if port is not None else (url.hostname or "", url.port or 0)

    client = Client(address)
    await client.run(jobs, scenario.limit_s, ends_with_watched=scenario.watched_only)
    counters = await asyncio.gather(*(host.counters() for host in lab.hosts.values()))
    return _measure(client, jobs, counters, scenario)


def _measure(client: Client, jobs: Sequence[Job], counters: Sequence[SimCounters], scenario: Scenario) -> Figures:
    counted = [job for job in jobs if job.watched] if scenario.watched_only else jobs
    expected = sum(len(job.turns) for job in counted)
    took = sorted(sent.took_s for sent in client.sent)
    first = sorted(sent.first_at - sent.due_at for sent in client.sent if sent.first_at is not None)
    logged = sorted((entry for counter in counters for entry in counter.requests), key=lambda entry: entry.at_s)
    return Figures(
        requests=expected,
        lost=expected - sum(sent.ok for sent in client.sent),
        mean_s=sum(took) / len(took),
        p99_s=percentile(took, 0.99),
        ttft_p50_s=percentile(first, 0.5),
        makespan_s=max(sent.ended_at for sent in client.sent) - min(sent.due_at for sent in client.sent),
        watched_max_s=max((sent.took_s for sent in client.sent if sent.watched), default=None),
        loads=sum(counter.loads for counter in counters),
        read_share=sum(entry.read_tokens for entry in logged) / max(1, sum(entry.prompt_tokens for entry in logged)),
        waited_inside=sum(entry.queued_s > WAIT_S for entry in logged[-50:]),
        answers_before_full=_answers_before_full(client, logged, scenario) if len(counters) == 1 else None,
    )


def _answers_before_full(client: Client, logged: Sequence[LoggedRequest], scenario: Scenario) -> int | None:
    """The number of answers that had ended when all slots of the only node were in use for the first time.

    ``None`` if they never were. ``logged`` is in the order of arrival at the node. All times are of one clock, that of
    this machine.
    """
    ends = sorted(sent.ended_at for sent in client.sent)
    ended = 0
    for number, entry in enumerate(logged, start=1):
        while ended < len(ends) and ends[ended] <= entry.at_s:
            ended += 1
        if number - ended >= scenario.hosts[0].slots:
            return ended
    return None


def _print_table(scenario: Scenario, figures: Mapping[str, Figures]) -> None:
    names = " and ".join(figure.removesuffix("_s") for figure in scenario.figures)
    today = f"; before this balancer: {scenario.today}" if scenario.today else ""
    print(f"\n{scenario.name} (goal: {names} <= {scenario.bound:g} x hand{today})")
    columns = ("mean", "p99", "ttft", "all", "watched", "loads", "read %", "inside", "full", "lost", "x hand")
    print(f"{'':<10}" + "".join(f"{column:>9}" for column in columns))
    for name, row in figures.items():
        cells = (
            f"{row.mean_s:.2f}",
            f"{row.p99_s:.2f}",
            f"{row.ttft_p50_s:.3f}",
            f"{row.makespan_s:.1f}",
            "" if row.watched_max_s is None else f"{row.watched_max_s:.2f}",
            row.loads,
            f"{row.read_share * 100:.0f}",
            row.waited_inside,
            "" if row.answers_before_full is None else row.answers_before_full,
            row.lost,
            f"{row.times_hand:.2f}",
        )
        misses = "" if name == HAND else "  " + ", ".join(_find_misses(scenario, row))
        print(f"{name:<10}" + "".join(f"{cell:>9}" for cell in cells) + misses.rstrip(), flush=True)


async def measure(given: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    checkouts = {"gpumesh": ROOT}
    if given.beside is not None:
        checkouts["beside"] = given.beside.resolve()
    results: dict[str, dict[str, Figures]] = {}
    for name in given.scenarios or SCENARIOS:
        # Short, because a runtime folder holds Unix sockets, whose paths are limited to 107 bytes.
        with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
            results[name] = await run_scenario(SCENARIOS[name], given.seed, checkouts, Path(folder))
        _print_table(SCENARIOS[name], results[name])
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout of gpumesh")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed or a request is lost")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # the stand-ins are always those of this checkout
    results = uvloop.run(measure(given))
    if given.json is not None:
        figures = {name: {route: asdict(row) for route, row in rows.items()} for name, rows in results.items()}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    missed = [name for name, rows in results.items() if _find_misses(SCENARIOS[name], rows["gpumesh"])]
    print(f"\ngoals missed: {', '.join(missed) or 'none'}")
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
