"""A batch on meshes that are killed (kill -9) again and again: each request must get exactly one result.

    python benchmarks/batch_kills.py [--requests 10000] [--kill-every 20] [--meshes 1] [--redis URL|own] [--kill-redis]
        [--json] [--check]

`gpumesh up` runs in processes of their own over simulated servers. Without ``--redis`` the batch is in a SQLite file,
on which one mesh works. With it, the batch is in that Redis, and ``--meshes`` work on it; they are killed in turn. A
killed mesh is started again at once. ``own``: a redis-server is started, which keeps its data on the disk (appendonly);
with ``--kill-redis`` it is killed too, each time after all meshes were, and started again after a second.

The stand-in's text depends on the prompt alone, so that each result is compared with the text that its prompt must get.
The report says how many answers the servers gave, which is more than there are requests: what was under way at a kill
is asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gpumesh.batches.base import BatchStore  # noqa: E402
from gpumesh.batches.opening import create_batch_store  # noqa: E402
from gpumesh.batches.values import Batch, BatchStatus  # noqa: E402
from gpumesh.config import load  # noqa: E402
from gpumesh.errors import BatchStoreError  # noqa: E402
from gpumesh.lab.ollama import SimOllama  # noqa: E402
from tests.batches.killed_mesh import (  # noqa: E402
    ANSWER_TOKENS,
    MeshProcess,
    check_results,
    submit_prompts,
    wait_for_results,
    write_mesh_yaml,
)
from tests.mesh.meshes import MODEL, host  # noqa: E402
from tests.redis_server import APPENDONLY, redis_server  # noqa: E402

SERVERS = 2
SLOTS = 4


@dataclass(frozen=True)
class Report:
    requests: int
    status: str
    seconds: float
    kills: int
    redis_kills: int
    results: int
    right: int
    lines_with_several: int
    failed: int
    answers_of_servers: int

    @property
    def is_right(self) -> bool:
        return self.results == self.right == self.requests and not self.lines_with_several and self.kills > 0


async def measure(
    requests: int, kill_every_s: float, meshes: int, redis: str | None, rate: float, *, kill_redis: bool
) -> Report:
    """Runs one batch to its end. ``rate``: about how many requests a second the servers can answer."""
    tokens_per_s = rate / (SERVERS * SLOTS) * sum(ANSWER_TOKENS) / 2
    # Two servers with the same list of models to the nanosecond would count as one machine.
    profiles = [
        host(f"n{number}", slots=SLOTS, answer_tokens=ANSWER_TOKENS, tokens_per_s=tokens_per_s)
        for number in range(SERVERS)
    ]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gm-kills-")))
        own_redis = None
        if redis == "own":
            own_redis = await stack.enter_async_context(redis_server(folder, *APPENDONLY))
            redis = own_redis.url
        more: dict[str, Any] = {} if redis is None else {"redis": {"url": redis}}
        servers = [await stack.enter_async_context(SimOllama(profile)) for profile in profiles]
        running = []
        for number in range(meshes):
            (own := folder / f"mesh{number}").mkdir()
            write_mesh_yaml(
                own / "mesh.yaml", [server.url for server in servers], slots=SLOTS, listen="127.0.0.1:0", more=more
            )
            running.append(MeshProcess(own, own / "mesh.yaml", "--no-gateway"))
            stack.push_async_callback(running[-1].close)
        topology = load(running[0].config)
        store = await stack.enter_async_context(create_batch_store(topology, running[0].batches))
        began = time.monotonic()
        batch = await submit_prompts(store, requests, MODEL)
        await asyncio.gather(*(mesh.start() for mesh in running))
        kills = redis_kills = 0
        for mesh in itertools.cycle(running):
            try:
                batch = await wait_for_results(store, batch, requests + 1, limit_s=kill_every_s)
            except TimeoutError:
                await mesh.end()
                kills += 1
                await mesh.start()
                if kill_redis and own_redis is not None and kills % meshes == 0:
                    own_redis.stop()
                    await asyncio.sleep(1.0)
                    await own_redis.start()
                    redis_kills += 1
                counts = (await get_batch(store, batch.id)).counts
                print(f"killed: {counts.completed} of {requests}", file=sys.stderr, flush=True)
                continue
            break
        seconds = time.monotonic() - began
        checked = await check_results(store, batch, MODEL)
        return Report(
            requests,
            batch.status.value,
            round(seconds, 1),
            kills,
            redis_kills,
            checked.results,
            checked.right,
            checked.lines_with_several,
            checked.failed,
            sum(server.counters.finished for server in servers),
        )


async def get_batch(store: BatchStore, batch_id: str) -> Batch:
    """The batch, as soon as a Redis that was started again has read its data."""
    while True:
        try:
            return await store.get_batch(batch_id)
        except BatchStoreError:
            await asyncio.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="S")
    parser.add_argument("--rate", type=float, default=100.0, metavar="N", help="requests/s of all servers together")
    parser.add_argument("--meshes", type=int, default=1)
    parser.add_argument("--redis", metavar="URL", help="`own`: a server of its own")
    parser.add_argument("--kill-redis", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit code 1 unless each request has one right result")
    arguments = parser.parse_args()
    if arguments.kill_redis and arguments.redis != "own":
        parser.error("--kill-redis needs --redis own")
    if arguments.meshes > 1 and arguments.redis is None:
        parser.error("only one mesh works on a SQLite file: --meshes needs --redis")
    report = asyncio.run(
        measure(
            arguments.requests,
            arguments.kill_every,
            arguments.meshes,
            arguments.redis,
            arguments.rate,
            kill_redis=arguments.kill_redis,
        )
    )
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        for name, value in asdict(report).items():
            print(f"{name.replace('_', ' '):>20} {value}")
    return int(arguments.check and not (report.is_right and report.status == BatchStatus.COMPLETED))


if __name__ == "__main__":
    raise SystemExit(main())
