"""Interactive requests at half of the mesh's capacity, without and with a running batch, which must use the gaps only.

    python benchmarks/batch_gaps.py [--seconds 60] [--rounds 1] [--json] [--check]

`gpumesh up` runs in a process of its own over two simulated servers of four slots; each answer takes about a second.
Interactive requests come at random times (Poisson) and stream. Phases with and without the batch take turns. The report
has the time to first token of the interactive requests (ms), and how busy the slots were. A running
request of a batch is not ended for an interactive one, so that this one waits for the end of an answer at most: the
batch may raise p99 by the longest answer of the batch. It must keep the slots more than 90 % busy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gateway import free_port  # noqa: E402

from gpumesh.batches.base import BatchStore  # noqa: E402
from gpumesh.batches.sqlite.store import SqliteBatchStore  # noqa: E402
from gpumesh.lab.ollama import SimOllama  # noqa: E402
from tests.batches.killed_mesh import MeshProcess, submit_prompts, write_mesh_yaml  # noqa: E402
from tests.mesh.meshes import MODEL, host  # noqa: E402

SERVERS = 2
SLOTS = 4
ANSWER_TOKENS = (10, 30)
TOKENS_PER_S = 20.0
LOAD = 0.5  # of all slots, by interactive requests
SETTLE_S = 3.0  # at the beginning of a phase, not measured
SAMPLE_S = 0.02
MAX_P99_GROWTH_MS = ANSWER_TOKENS[1] / TOKENS_PER_S * 1000
MIN_BUSY = 0.9


@dataclass(frozen=True)
class Phase:
    """``busy``: the share of the slots that ran a request. ``batch_results``: how many requests of the batch ended."""

    with_batch: bool
    interactive: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_max_ms: float
    busy: float
    batch_results: int


async def stream(session: aiohttp.ClientSession, url: str, number: int) -> float:
    """Sends one interactive request. Returns its time to first token in ms."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"interactive {number}"}], "stream": True}
    began = time.perf_counter()
    ttft_ms: float | None = None
    headers = {"X-GPUMesh-Priority": "interactive"}
    async with session.post(f"{url}/api/chat", json=body, headers=headers) as response:
        response.raise_for_status()
        async for _ in response.content:
            if ttft_ms is None:
                ttft_ms = (time.perf_counter() - began) * 1000
    assert ttft_ms is not None, "an answer without a token"
    return ttft_ms


async def send_interactive(session: aiohttp.ClientSession, url: str, seconds: float, rng: random.Random) -> list[float]:
    """Sends requests at random times for so long. Returns their times to first token in ms, without the first few."""
    rate = LOAD * SERVERS * SLOTS * TOKENS_PER_S / (sum(ANSWER_TOKENS) / 2)
    began = time.monotonic()
    tasks: list[tuple[bool, asyncio.Task[float]]] = []
    async with asyncio.TaskGroup() as group:
        while (elapsed_s := time.monotonic() - began) < seconds:
            task = group.create_task(stream(session, url, rng.randrange(1 << 30)))
            tasks.append((elapsed_s > SETTLE_S, task))
            await asyncio.sleep(rng.expovariate(rate))
    return sorted(task.result() for is_measured, task in tasks if is_measured)


async def sample_busy(servers: Sequence[SimOllama], seconds: float) -> float:
    """The mean share of the slots that run a request, from ``SETTLE_S`` on until ``seconds`` have passed."""
    await asyncio.sleep(SETTLE_S)
    ends_at = time.monotonic() + seconds - SETTLE_S
    samples = []
    while time.monotonic() < ends_at:
        samples.append(sum(server.counters.running for server in servers) / (SERVERS * SLOTS))
        await asyncio.sleep(SAMPLE_S)
    return sum(samples) / len(samples)


async def run_phase(
    url: str, servers: Sequence[SimOllama], store: BatchStore, seconds: float, *, with_batch: bool, seed: int
) -> Phase:
    batch = await submit_prompts(store, int(seconds * 100), MODEL) if with_batch else None
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        busy = group.create_task(sample_busy(servers, seconds))
        times = group.create_task(send_interactive(session, url, seconds, random.Random(seed)))
    results = 0
    if batch is not None:
        results = (await store.cancel(batch.id)).counts.completed
        while not (await store.get_batch(batch.id)).status.has_ended:
            await asyncio.sleep(0.1)
    ttft = times.result()
    return Phase(
        with_batch,
        len(ttft),
        round(ttft[len(ttft) // 2], 1),
        round(ttft[int(len(ttft) * 0.99)], 1),
        round(ttft[-1], 1),
        round(busy.result(), 3),
        results,
    )


async def wait_until_up(url: str) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/mesh/status") as response:
                    if all(node["health"] == "healthy" for node in (await response.json())["nodes"]):
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


async def measure(seconds: float, rounds: int) -> list[Phase]:
    """The phases in turn: without and with a batch."""
    # Two servers with the same list of models to the nanosecond would count as one machine.
    changes: dict[str, Any] = {"slots": SLOTS, "answer_tokens": ANSWER_TOKENS, "tokens_per_s": TOKENS_PER_S}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gm-gaps-")))
        servers = [
            await stack.enter_async_context(SimOllama(host(f"n{number}", **changes))) for number in range(SERVERS)
        ]
        port = free_port()
        config, url = folder / "mesh.yaml", f"http://127.0.0.1:{port}"
        write_mesh_yaml(config, [server.url for server in servers], slots=SLOTS, listen=f"127.0.0.1:{port}", more={})
        mesh = MeshProcess(folder, config)
        stack.push_async_callback(mesh.close)
        await mesh.start()
        await wait_until_up(url)
        store = await stack.enter_async_context(SqliteBatchStore(mesh.batches))
        phases = []
        for number in range(rounds * 2):
            phase = await run_phase(url, servers, store, seconds, with_batch=number % 2 == 1, seed=number // 2)
            print(asdict(phase), file=sys.stderr, flush=True)
            phases.append(phase)
        return phases


def find_problems(phases: Sequence[Phase]) -> list[str]:
    problems = []
    for without, with_batch in zip(phases[::2], phases[1::2], strict=True):
        growth_ms = with_batch.ttft_p99_ms - without.ttft_p99_ms
        if growth_ms > MAX_P99_GROWTH_MS:
            problems.append(f"the batch raises p99 by {growth_ms:.0f} ms, more than {MAX_P99_GROWTH_MS:.0f} ms")
        if with_batch.busy <= MIN_BUSY:
            problems.append(f"with the batch the slots are {with_batch.busy:.1%} busy")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the batch does more than use the gaps")
    arguments = parser.parse_args()
    phases = asyncio.run(measure(arguments.seconds, arguments.rounds))
    if arguments.json:
        print(json.dumps([asdict(phase) for phase in phases]))
    problems = find_problems(phases)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(arguments.check and bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
