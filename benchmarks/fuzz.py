"""Fuzzes all that hosts and clients feed, beside honest streams that must not notice.

    python benchmarks/fuzz.py [--minutes 15] [--seed 1] [--only requests answers routes greetings parsers]
                              [--findings FOLDER] [--json] [--check]
    python benchmarks/fuzz.py --replay FILE ...

`gpumesh up` in a process of its own, with two honest nodes (`fast_ollama.py`) and two whose servers are ours:

- requests: bytes on the gateway's socket, mutated from good requests
- answers: bytes that a hostile node sends for a request, on each route that streams
- routes: what a hostile node says of itself, in every merged route, in status and metrics
- greetings: what a port says where the probes look for a server, in this process
- parsers: every parser of probes, ssh, streams, requests and messages, and the hot path's client on bytes, in a process
  of its own, each bounded in time and memory

All the time `stream_watch.py` has honest streams through the gateway and knows each token's delay, less what the
machine itself caused. What failed is a file in ``--findings``; ``--replay`` takes it, and once it is mended it belongs
into tests/fuzz/corpus. A seed gives the same inputs again. ``--check`` exits 1 unless no case failed, no stall of the
gateway's own was above 100 ms, no honest stream was lost, memory stayed flat, and the log has no traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from fast_ollama import MODEL as HONEST_MODEL  # noqa: E402
from gateway import direct_node, free_port, program, rss_kb  # noqa: E402

from tests.fuzz import mutators, parsers, wire  # noqa: E402
from tests.fuzz.cases import Case, load, save  # noqa: E402

STALL_MS = 100.0
GROWTH_MIB = 48.0  # what a cache or two may take; a leak of 15 minutes is more
HONEST = ("honest-a", "honest-b")
PAIRS = 12  # of hostile nodes, each with its own model: a node whose answers were bad is not asked for seconds
PROBED_S = 2.5  # gpumesh.mesh.nodes.prober.BACKEND_INTERVAL_S, and a little
KINDS = ("requests", "answers", "routes", "greetings", "parsers")
ROUTE_MUTATORS = (mutators.json_value, mutators.json_value, mutators.nest_deeply, mutators.widen, mutators.splice)
PARSER_HANGS_S = 20
REMEMBERED_S = 10.0


@dataclass
class Tally:
    """``failed``: what went wrong, and the file that shows it."""

    cases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Streams:
    """What `stream_watch.py` saw. ``stalls``: the worst, each with the cases that were under way."""

    tokens: int = 0
    lost: int = 0
    longest: dict[str, float] = field(default_factory=dict)
    stalls: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Played:
    case: Case
    end: float | None = None


@dataclass
class Stage:
    port: int
    process: asyncio.subprocess.Process
    log: Path
    nodes: list[wire.HostileNode]
    findings: Path
    tally: Tally = field(default_factory=Tally)
    streams: Streams = field(default_factory=Streams)
    played: list[Played] = field(default_factory=list)
    memory_kb: list[int] = field(default_factory=list)
    read: int = 0  # of the log

    @contextlib.contextmanager
    def playing(self, case: Case) -> Iterator[None]:
        """Noted, so that a stall can be put down to it."""
        self.tally.cases[case.target.partition(":")[0]] += 1
        now = time.monotonic()
        self.played = [known for known in self.played if known.end is None or now - known.end < REMEMBERED_S]
        self.played.append(played := Played(case))
        try:
            yield
        finally:
            played.end = time.monotonic()

    def under_way(self, since: float) -> list[Case]:
        return [known.case for known in self.played if known.end is None or known.end >= since]

    def fail(self, case: Case, why: str) -> None:
        path = save(case, self.findings)
        self.tally.failed.append((why, str(path)))
        print(f"FAILED {why[:300]}\n       {path} ({case.note}, {case.size} bytes)", file=sys.stderr, flush=True)

    def check_log(self) -> str | None:
        """What the log has got since the last look that it must not have."""
        with self.log.open("rb") as log:
            log.seek(self.read)
            new = log.read()
        self.read += len(new)
        at = max(new.find(b"Traceback"), new.find(b"failed inside"))
        return None if at < 0 else f"in the log: {new[max(at - 300, 0) : at + 1500].decode(errors='replace')}"


Kind = Callable[["Stage", random.Random, float, int], Coroutine[Any, Any, None]]
"""Plays cases until the time is over; the last is the worker's number."""


# -- kinds of case ---------------------------------------------------------------------------------------------------


async def play(stage: Stage, case: Case, pair: int = 0) -> None:
    """One case, by its target; ``pair``: on these hostile nodes. Raises AssertionError for what must not be."""
    kind, _, path = case.target.partition(":")
    if kind == "request":
        answer = await wire.send_case(stage.port, case)
        found = wire.statuses(answer)
        stage.tally.outcomes.update(str(status) for status in found or ("no answer",))
        assert 500 not in found, f"500: {answer[-400:]!r}"
    elif kind == "answer":
        number = sum(stage.tally.cases.values())
        nodes = {f"hostile-{pair}{side}": stage.nodes[2 * pair + place] for place, side in enumerate("ab")}
        for node in nodes.values():
            node.answers[number] = case
        try:
            model = f"hostile-{pair}:1b"
            status = await wire.chat(stage.port, path, stream=case.size % 3 != 0, model=model, number=number)
        finally:
            for node in nodes.values():
                del node.answers[number]
        stage.tally.outcomes[str(status)] += 1
        await wire.heal(stage.port, {name: node.model for name, node in nodes.items()})
    elif kind == "route":
        node = stage.nodes[-1]
        node.bodies[path] = case.data
        try:
            await wire.check_routes(stage.port, HONEST)
            await asyncio.sleep(PROBED_S)  # what a node says of itself counts once a probe has read it
            await wire.check_routes(stage.port, HONEST)
        finally:
            del node.bodies[path]
    elif kind == "greeting":
        await wire.greet(case)
    else:
        await asyncio.to_thread(run_here, case)


def run_here(case: Case) -> None:
    """In this process, and not in a running loop."""
    if case.target == "upstream":
        asyncio.run(wire.upstream(case))
    else:
        parsers.run(case)


async def attempt(stage: Stage, case: Case, pair: int = 0) -> None:
    try:
        with stage.playing(case):
            await play(stage, case, pair)
        wrong = stage.check_log()
    except AssertionError as error:
        wrong = str(error)
    except Exception as error:  # whatever comes is a finding
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        stage.fail(case, wrong)
    if stage.process.returncode is not None:
        stage.fail(case, f"the mesh ended with {stage.process.returncode}")
        raise SystemExit(1)


async def requests(stage: Stage, rng: random.Random, until: float, _worker: int) -> None:
    seeds = wire.request_seeds(HONEST_MODEL)
    while time.monotonic() < until:
        await attempt(stage, mutators.mutate("request", seeds, rng, http=True))


async def answers(stage: Stage, rng: random.Random, until: float, pair: int) -> None:
    while time.monotonic() < until:
        path = rng.choice(wire.ANSWER_PATHS)
        await attempt(stage, mutators.mutate(f"answer:{path}", wire.answer_seeds(path), rng, http=True), pair)


async def routes(stage: Stage, rng: random.Random, until: float, _worker: int) -> None:
    while time.monotonic() < until:
        path = rng.choice(list(wire.ROUTE_SEEDS))
        mutator = rng.choice(ROUTE_MUTATORS)
        await attempt(stage, Case(f"route:{path}", mutator(wire.ROUTE_SEEDS[path], rng), mutator.__name__))
        await asyncio.sleep(PROBED_S)  # until the node is up again


async def greetings(stage: Stage, rng: random.Random, until: float, _worker: int) -> None:
    while time.monotonic() < until:
        await attempt(stage, mutators.mutate("greeting", wire.GREETING_SEEDS, rng, http=True))
        await asyncio.sleep(0.2)


async def parser_child(stage: Stage, seed: int, until: float) -> None:
    """In a process of its own and after all others: it takes all the time that it gets."""
    arguments = ("--only", "parsers", "--seed", str(seed), "--minutes", str((until - time.monotonic()) / 60))
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", "19", sys.executable, __file__, *arguments, "--findings", str(stage.findings), "--json"),
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    found = json.loads(out)
    stage.tally.cases["parsers"] += found["cases"]["parsers"]
    stage.tally.failed += [(why, path) for why, path in found["failed"]]


def fuzz_parsers(rng: random.Random, until: float, findings: Path) -> dict[str, Any]:
    """One of a kind (target, mutator, error) is enough."""
    tally = Tally()
    seen: set[tuple[str, str, str]] = set()

    def hangs(*_: object) -> None:
        raise AssertionError(f"it takes more than {PARSER_HANGS_S} s")

    signal.signal(signal.SIGALRM, hangs)
    while time.monotonic() < until:
        name = rng.choice([*parsers.TARGETS, *["upstream"] * 8, *["http-request"] * 4])
        seeds = wire.answer_seeds(rng.choice(wire.ANSWER_PATHS)) if name == "upstream" else parsers.TARGETS[name].seeds
        case = mutators.mutate(name, seeds, rng, http=name in ("upstream", "http-request"))
        tally.cases["parsers"] += 1
        signal.alarm(PARSER_HANGS_S)
        try:
            run_here(case)
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


# -- beside them -----------------------------------------------------------------------------------------------------


async def watch(stage: Stage, direct_port: int, until: float) -> None:
    arguments = (str(stage.port), str(direct_port), str(stage.process.pid))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "stream_watch.py"), *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    seen = stage.streams
    async for line in process.stdout:
        for kind, told in json.loads(line).items():
            if kind == "second":
                seen.tokens += told.pop("tokens")
                seen.lost += told.pop("lost")
                seen.longest = {name: max(value, seen.longest.get(name, 0.0)) for name, value in told.items()}
                stage.memory_kb.append(rss_kb(stage.process.pid))
            elif kind == "stall":
                cases = stage.under_way(told["at"] - told["delay_ms"] / 1000.0)
                told["cases"] = [f"{case.target} {case.note} {case.size}" for case in cases]
                if told["own_ms"] > STALL_MS:
                    told["files"] = [str(save(case, stage.findings / "stalls")) for case in cases]
                    print(f"STALL {json.dumps(told)}", file=sys.stderr, flush=True)
                seen.stalls = sorted([*seen.stalls, told], key=lambda stall: -float(stall["own_ms"]))[:10]
        if time.monotonic() >= until:
            process.stdin.close()
    await process.wait()


@contextlib.asynccontextmanager
async def stand_in() -> AsyncIterator[int]:
    """An honest server in a process of its own; its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "fast_ollama.py"), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        yield int(await asyncio.wait_for(process.stdout.readline(), 30))
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def stage_of(findings: Path) -> AsyncIterator[tuple[Stage, int]]:
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gm-fuzz-")))
        honest = [await stack.enter_async_context(stand_in()) for _ in range(2)]
        direct = await stack.enter_async_context(stand_in())
        models = [f"hostile-{pair}:1b" for pair in range(PAIRS) for _ in "ab"]
        nodes = [await stack.enter_async_context(wire.hostile_node(model)) for model in models]
        port = free_port()
        config = folder / "mesh.yaml"
        runtime = folder / "run"
        runtime.mkdir(mode=0o700)
        specs = [
            *(direct_node(name, at) for name, at in zip(HONEST, honest, strict=True)),
            *(direct_node(f"hostile-{at // 2}{'ab'[at % 2]}", node.port, 4) for at, node in enumerate(nodes)),
        ]
        gateway = {"listen": f"127.0.0.1:{port}"}
        config.write_text(json.dumps({"version": 1, "name": "fuzz", "gateway": gateway, "nodes": specs}))
        argv = (sys.executable, "-m", "gpumesh", "--config", str(config), "--quiet", "up")
        environment = {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(HERE.parent), "HOME": str(folder)}
        process = await stack.enter_async_context(program(*argv, port=port, folder=folder, **environment))
        async with asyncio.timeout(60):
            while True:
                _, body = await wire.send_request(port, "/mesh/status")
                if all(node["health"] == "healthy" for node in json.loads(body)["nodes"]):
                    break
                await asyncio.sleep(0.2)
        yield Stage(port, process, folder / f"{Path(sys.executable).name}.log", nodes, findings), direct


async def fuzz(given: argparse.Namespace) -> dict[str, Any]:
    kinds: dict[str, tuple[Kind, int]] = {
        "requests": (requests, 4),
        "answers": (answers, PAIRS - 1),
        "routes": (routes, 1),
        "greetings": (greetings, 1),
    }
    async with stage_of(given.findings) as (stage, direct):
        await asyncio.sleep(2.0)
        until = time.monotonic() + given.minutes * 60
        async with asyncio.TaskGroup() as group:
            group.create_task(watch(stage, direct, until))
            for kind, (run, workers) in kinds.items():
                for number in range(workers if kind in given.only else 0):
                    rng = random.Random(f"{given.seed}/{kind}/{number}")
                    group.create_task(run(stage, rng, until, number))
            if "parsers" in given.only:
                group.create_task(parser_child(stage, given.seed, until))
        for node in stage.nodes:
            node.bodies.clear()
        await wire.check_routes(stage.port, HONEST)
    first, last = stage.memory_kb[: max(len(stage.memory_kb) // 5, 1)], stage.memory_kb[-10:]
    return {
        "cases": dict(stage.tally.cases),
        "outcomes": dict(stage.tally.outcomes),
        "failed": stage.tally.failed,
        "streams": vars(stage.streams),
        "memory_mib": {"begin": max(first) / 1024, "end": min(last) / 1024, "most": max(stage.memory_kb) / 1024},
    }


async def replay(given: argparse.Namespace) -> dict[str, Any]:
    async with stage_of(given.findings) as (stage, direct):
        watching = asyncio.create_task(watch(stage, direct, time.monotonic() + 3.0 + len(given.replay)))
        await asyncio.sleep(1.5)
        for path in given.replay:
            print(f"{path} …", file=sys.stderr)
            await attempt(stage, load(path))
        await watching
    return {"failed": stage.tally.failed, "outcomes": dict(stage.tally.outcomes), "streams": vars(stage.streams)}


def wrong(figures: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found: list[str] = [f"{why.partition(chr(10))[0][:200]} ({path})" for why, path in figures["failed"]]
    streams, memory = figures.get("streams"), figures.get("memory_mib")
    if streams is not None:
        found += [
            f"a stall of {stall['own_ms']:.0f} ms beside {'; '.join(stall['cases'])}"
            for stall in streams["stalls"]
            if stall["own_ms"] > STALL_MS
        ]
        if streams["lost"]:
            found.append(f"{streams['lost']} honest streams were lost")
    if memory is not None and memory["end"] > memory["begin"] + GROWTH_MIB:
        found.append(f"memory grew from {memory['begin']:.0f} to {memory['end']:.0f} MiB")
    return found


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
    found = wrong(figures)
    print("\n".join(found) or "nothing failed, nothing stalled, nothing grew", file=sys.stderr)
    return 1 if found and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
