"""The setup of fuzz.py: a mesh in a process of its own with honest and hostile nodes, and the honest streams through
it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from gateway import direct_node, free_port, program, rss_kb  # noqa: E402

from tests.fuzz import wire  # noqa: E402
from tests.fuzz.cases import Case, save  # noqa: E402

STALL_MS = 100.0
HONEST = ("honest-a", "honest-b")
# Pairs of hostile nodes, each with its own model: a node whose answers were bad gets no requests for some seconds.
PAIRS = 12
REMEMBERED_S = 10.0  # how long an ended case can be taken for the cause of a stall


@dataclass
class Tally:
    """Counts of cases and outcomes. ``failed``: the reason of each failure, and the file with its case."""

    cases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Streams:
    """The figures of `stream_watch.py`. ``stalls``: the worst ones, each with the cases that ran at that time."""

    tokens: int = 0
    lost: int = 0
    longest: dict[str, float] = field(default_factory=dict)
    stalls: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CaseRun:
    """A case that runs, or that ended at ``ended_at`` (monotonic)."""

    case: Case
    ended_at: float | None = None


@dataclass
class Setup:
    """The running mesh, its hostile nodes, and all that was observed."""

    port: int
    process: asyncio.subprocess.Process
    log: Path
    nodes: list[wire.HostileNode]
    findings: Path
    tally: Tally = field(default_factory=Tally)
    streams: Streams = field(default_factory=Streams)
    recent_runs: list[CaseRun] = field(default_factory=list)
    memory_kb: list[int] = field(default_factory=list)
    log_position: int = 0

    @contextlib.contextmanager
    def record_run(self, case: Case) -> Iterator[None]:
        """Remembers the case, so that a stall at the same time can be attributed to it."""
        self.tally.cases[case.target.partition(":")[0]] += 1
        now = time.monotonic()
        self.recent_runs = [
            run for run in self.recent_runs if run.ended_at is None or now - run.ended_at < REMEMBERED_S
        ]
        self.recent_runs.append(current := CaseRun(case))
        try:
            yield
        finally:
            current.ended_at = time.monotonic()

    def cases_since(self, since: float) -> list[Case]:
        """The cases that run, or have run after this time."""
        return [run.case for run in self.recent_runs if run.ended_at is None or run.ended_at >= since]

    def record_failure(self, case: Case, reason: str) -> None:
        path = save(case, self.findings)
        self.tally.failed.append((reason, str(path)))
        print(f"FAILED {reason[:300]}\n       {path} ({case.note}, {case.size} bytes)", file=sys.stderr, flush=True)

    def check_log(self) -> str | None:
        """A traceback or failure that was logged since the last call; ``None`` if there is none."""
        with self.log.open("rb") as log:
            log.seek(self.log_position)
            new = log.read()
        self.log_position += len(new)
        at = max(new.find(b"Traceback"), new.find(b"failed inside"))
        return None if at < 0 else f"in the log: {new[max(at - 300, 0) : at + 1500].decode(errors='replace')}"


async def watch_streams(setup: Setup, direct_port: int, until: float) -> None:
    """Runs `stream_watch.py` and adds its figures to ``setup.streams``."""
    arguments = (str(setup.port), str(direct_port), str(setup.process.pid))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "stream_watch.py"), *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    streams = setup.streams
    async for line in process.stdout:
        for kind, figures in json.loads(line).items():
            if kind == "second":
                streams.tokens += figures.pop("tokens")
                streams.lost += figures.pop("lost")
                streams.longest = {name: max(value, streams.longest.get(name, 0.0)) for name, value in figures.items()}
                setup.memory_kb.append(rss_kb(setup.process.pid))
            elif kind == "stall":
                cases = setup.cases_since(figures["at"] - figures["delay_ms"] / 1000.0)
                figures["cases"] = [f"{case.target} {case.note} {case.size}" for case in cases]
                if figures["own_ms"] > STALL_MS:
                    figures["files"] = [str(save(case, setup.findings / "stalls")) for case in cases]
                    print(f"STALL {json.dumps(figures)}", file=sys.stderr, flush=True)
                streams.stalls = sorted([*streams.stalls, figures], key=lambda stall: -float(stall["own_ms"]))[:10]
        if time.monotonic() >= until:
            process.stdin.close()
    await process.wait()


@contextlib.asynccontextmanager
async def stand_in() -> AsyncIterator[int]:
    """Runs an honest server in a process of its own, and yields its port."""
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
async def start_setup(findings: Path) -> AsyncIterator[tuple[Setup, int]]:
    """Starts the servers and the mesh. Yields the setup and the port of an honest server that is no node."""
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
        yield Setup(port, process, folder / f"{Path(sys.executable).name}.log", nodes, findings), direct
