"""Fuzzes all input that comes from hosts and clients, while honest streams run that must not suffer.

    python benchmarks/fuzz.py [--minutes 15] [--seed 1] [--only requests answers routes greetings parsers]
                              [--findings FOLDER] [--json] [--check]
    python benchmarks/fuzz.py --replay FILE ...

`gpumesh up` runs in a process of its own, with two honest nodes (`fast_ollama.py`) and pairs of hostile nodes, whose
servers are in this process:

- requests: bytes on the gateway's socket, mutated from good requests
- answers: bytes that a hostile node sends for a request, on each route that streams
- routes: the models and versions that a hostile node reports, in every merged route, in status and metrics
- greetings: bytes from a port at which the probes look for a server, in this process
- parsers: every parser of probes, ssh, streams, requests and messages, and the hot path's client on bytes, in a process
  of its own, each bounded in time and memory

All the time `stream_watch.py` runs honest streams through the gateway and measures each token's delay, without the part
that the machine itself caused. A case that failed becomes a file in ``--findings``. ``--replay`` runs it again; once it
is mended the file belongs into tests/fuzz/corpus. The same seed gives the same inputs. ``--check`` exits 1 unless no
case failed, the gateway caused no stall above 100 ms, no honest stream was lost, memory did not grow, and the log has
no traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from fast_ollama import MODEL as HONEST_MODEL  # noqa: E402
from fuzz_setup import HONEST, PAIRS, STALL_MS, Setup, Tally, start_setup, watch_streams  # noqa: E402

from tests.fuzz import mutators, parsers, wire  # noqa: E402
from tests.fuzz.cases import Case, load, save  # noqa: E402

MAX_GROWTH_MIB = 48.0  # room for a cache or two; a leak of 15 minutes is larger
PROBED_S = 2.5  # a little more than gpumesh.mesh.nodes.prober.BACKEND_INTERVAL_S
KINDS = ("requests", "answers", "routes", "greetings", "parsers")
ROUTE_MUTATORS = (mutators.json_value, mutators.json_value, mutators.nest_deeply, mutators.widen, mutators.splice)
PARSER_TIMEOUT_S = 20


Fuzzer = Callable[[Setup, random.Random, float, int], Coroutine[Any, Any, None]]
"""Runs cases of one kind until a time (monotonic). The last argument is the number of the worker."""


# -- kinds of case ---------------------------------------------------------------------------------------------------


async def run_case(setup: Setup, case: Case, pair: int = 0) -> None:
    """Runs a case by its target. ``pair``: the pair of hostile nodes for an answer. Raises AssertionError if the mesh
    fails."""
    kind, _, path = case.target.partition(":")
    if kind == "request":
        answer = await wire.send_case(setup.port, case)
        statuses = wire.statuses(answer)
        setup.tally.outcomes.update(str(status) for status in statuses or ("no answer",))
        assert 500 not in statuses, f"500: {answer[-400:]!r}"
    elif kind == "answer":
        number = sum(setup.tally.cases.values())
        nodes = {f"hostile-{pair}{side}": setup.nodes[2 * pair + place] for place, side in enumerate("ab")}
        for node in nodes.values():
            node.answers[number] = case
        try:
            model = f"hostile-{pair}:1b"
            status = await wire.chat(setup.port, path, stream=case.size % 3 != 0, model=model, number=number)
        finally:
            for node in nodes.values():
                del node.answers[number]
        setup.tally.outcomes[str(status)] += 1
        await wire.heal(setup.port, {name: node.model for name, node in nodes.items()})
    elif kind == "route":
        node = setup.nodes[-1]
        node.bodies[path] = case.data
        try:
            await wire.check_routes(setup.port, HONEST)
            await asyncio.sleep(PROBED_S)  # until a probe has read the node's new answer
            await wire.check_routes(setup.port, HONEST)
        finally:
            del node.bodies[path]
    elif kind == "greeting":
        await wire.greet(case)
    else:
        await asyncio.to_thread(run_parser_case, case)


def run_parser_case(case: Case) -> None:
    """Runs a case in this process. Must not be called from a running event loop."""
    if case.target == "upstream":
        asyncio.run(wire.upstream(case))
    else:
        parsers.run(case)


async def check_case(setup: Setup, case: Case, pair: int = 0) -> None:
    """Runs a case and records its failure. Raises SystemExit when the mesh has ended."""
    try:
        with setup.record_run(case):
            await run_case(setup, case, pair)
        failure = setup.check_log()
    except AssertionError as error:
        failure = str(error)
    except Exception as error:  # any other error is a finding, too
        failure = f"{type(error).__name__}: {error}"
    if failure is not None:
        setup.record_failure(case, failure)
    if setup.process.returncode is not None:
        setup.record_failure(case, f"the mesh ended with {setup.process.returncode}")
        raise SystemExit(1)


async def requests(setup: Setup, rng: random.Random, until: float, _worker: int) -> None:
    seeds = wire.request_seeds(HONEST_MODEL)
    while time.monotonic() < until:
        await check_case(setup, mutators.mutate("request", seeds, rng, http=True))


async def answers(setup: Setup, rng: random.Random, until: float, pair: int) -> None:
    while time.monotonic() < until:
        path = rng.choice(wire.ANSWER_PATHS)
        await check_case(setup, mutators.mutate(f"answer:{path}", wire.answer_seeds(path), rng, http=True), pair)


async def routes(setup: Setup, rng: random.Random, until: float, _worker: int) -> None:
    while time.monotonic() < until:
        path = rng.choice(list(wire.ROUTE_SEEDS))
        mutator = rng.choice(ROUTE_MUTATORS)
        await check_case(setup, Case(f"route:{path}", mutator(wire.ROUTE_SEEDS[path], rng), mutator.__name__))
        await asyncio.sleep(PROBED_S)  # until the node is up again


async def greetings(setup: Setup, rng: random.Random, until: float, _worker: int) -> None:
    while time.monotonic() < until:
        await check_case(setup, mutators.mutate("greeting", wire.GREETING_SEEDS, rng, http=True))
        await asyncio.sleep(0.2)


async def parser_child(setup: Setup, seed: int, until: float) -> None:
    """Fuzzes the parsers in a process of its own, with the lowest priority: it would use all the CPU time it can
    get."""
    arguments = ("--only", "parsers", "--seed", str(seed), "--minutes", str((until - time.monotonic()) / 60))
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", "19", sys.executable, __file__, *arguments, "--findings", str(setup.findings), "--json"),
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    figures = json.loads(out)
    setup.tally.cases["parsers"] += figures["cases"]["parsers"]
    setup.tally.failed += [(reason, path) for reason, path in figures["failed"]]


def fuzz_parsers(rng: random.Random, until: float, findings: Path) -> dict[str, Any]:
    """Runs cases of all parsers. Of equal failures (target, mutator, type of error) only the first is saved."""
    tally = Tally()
    seen: set[tuple[str, str, str]] = set()

    def raise_timeout(*_: object) -> None:
        raise AssertionError(f"it takes more than {PARSER_TIMEOUT_S} s")

    signal.signal(signal.SIGALRM, raise_timeout)
    while time.monotonic() < until:
        name = rng.choice([*parsers.TARGETS, *["upstream"] * 8, *["http-request"] * 4])
        seeds = wire.answer_seeds(rng.choice(wire.ANSWER_PATHS)) if name == "upstream" else parsers.TARGETS[name].seeds
        case = mutators.mutate(name, seeds, rng, http=name in ("upstream", "http-request"))
        tally.cases["parsers"] += 1
        signal.alarm(PARSER_TIMEOUT_S)
        try:
            run_parser_case(case)
        except Exception as error:
            kind = (name, case.note, type(error).__name__)
            if kind not in seen:
                seen.add(kind)
                path = save(case, findings)
                tally.failed.append((f"{name}: {type(error).__name__}: {str(error)[:300]}", str(path)))
                print(f"FAILED {tally.failed[-1][0]}\n       {path} ({case.note})", file=sys.stderr, flush=True)
        finally:
            signal.alarm(0)
    return {"cases": dict(tally.cases), "failed": tally.failed}


async def fuzz(given: argparse.Namespace) -> dict[str, Any]:
    fuzzers: dict[str, tuple[Fuzzer, int]] = {  # with the number of workers
        "requests": (requests, 4),
        "answers": (answers, PAIRS - 1),
        "routes": (routes, 1),
        "greetings": (greetings, 1),
    }
    async with start_setup(given.findings) as (setup, direct):
        await asyncio.sleep(2.0)
        until = time.monotonic() + given.minutes * 60
        async with asyncio.TaskGroup() as group:
            group.create_task(watch_streams(setup, direct, until))
            for kind, (run, workers) in fuzzers.items():
                for number in range(workers if kind in given.only else 0):
                    rng = random.Random(f"{given.seed}/{kind}/{number}")
                    group.create_task(run(setup, rng, until, number))
            if "parsers" in given.only:
                group.create_task(parser_child(setup, given.seed, until))
        for node in setup.nodes:
            node.bodies.clear()
        await wire.check_routes(setup.port, HONEST)
    # The mesh needs some time until its caches are full: the most of the first fifth is the start.
    first, last = setup.memory_kb[: max(len(setup.memory_kb) // 5, 1)], setup.memory_kb[-10:]
    return {
        "cases": dict(setup.tally.cases),
        "outcomes": dict(setup.tally.outcomes),
        "failed": setup.tally.failed,
        "streams": vars(setup.streams),
        "memory_mib": {"begin": max(first) / 1024, "end": min(last) / 1024, "most": max(setup.memory_kb) / 1024},
    }


async def replay(given: argparse.Namespace) -> dict[str, Any]:
    async with start_setup(given.findings) as (setup, direct):
        watching = asyncio.create_task(watch_streams(setup, direct, time.monotonic() + 3.0 + len(given.replay)))
        await asyncio.sleep(1.5)
        for path in given.replay:
            print(f"{path} …", file=sys.stderr)
            await check_case(setup, load(path))
        await watching
    return {"failed": setup.tally.failed, "outcomes": dict(setup.tally.outcomes), "streams": vars(setup.streams)}


def list_problems(figures: dict[str, Any]) -> list[str]:
    """A sentence for each figure that is not as it must be."""
    problems = [f"{reason.partition(chr(10))[0][:200]} ({path})" for reason, path in figures["failed"]]
    streams, memory = figures.get("streams"), figures.get("memory_mib")
    if streams is not None:
        problems += [
            f"a stall of {stall['own_ms']:.0f} ms beside {'; '.join(stall['cases'])}"
            for stall in streams["stalls"]
            if stall["own_ms"] > STALL_MS
        ]
        if streams["lost"]:
            problems.append(f"{streams['lost']} honest streams were lost")
    if memory is not None and memory["end"] > memory["begin"] + MAX_GROWTH_MIB:
        problems.append(f"memory grew from {memory['begin']:.0f} to {memory['end']:.0f} MiB")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--replay", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 when anything failed")
    given = parser.parse_args()
    os.environ.pop("GPUMESH_CONFIG", None)
    if given.replay:
        figures = asyncio.run(replay(given))
    elif tuple(given.only) == ("parsers",):
        until = time.monotonic() + given.minutes * 60
        figures = fuzz_parsers(random.Random(given.seed), until, given.findings)
    else:
        figures = asyncio.run(fuzz(given))
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:<12} {json.dumps(value)}")
    problems = list_problems(figures)
    print("\n".join(problems) or "nothing failed, nothing stalled, nothing grew", file=sys.stderr)
    return 1 if problems and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
