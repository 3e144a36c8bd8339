"""Measures several gateway processes over one real Redis: what waits in the servers, the order, and what outages cost.

::

    python benchmarks/several_gateways.py [--gateways 4] [--seconds 15] [--rate 200] [--only NAME …]

The servers are stand-ins with slots (tests/coordination/slot_server.py), which count the requests that wait in them:
with ``max_parallel`` set to the slots there must be none. Goals: nothing waits at 200 requests/s; interactive requests
of one gateway overtake the waiting batch requests of another; the places of a killed gateway are free within 5 s; no
request fails while Redis is stopped, hung or flushed, and coordination is back within 5 s; coordination costs a request
at most 0.5 ms at p50, and nothing while Redis is away.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.coordination.mesh_processes import gateway_processes, percentile  # noqa: E402
from tests.coordination.redis_server import RedisServer  # noqa: E402
from tests.coordination.scenarios import (  # noqa: E402
    interactive_beside_batch,
    kill_gateway,
    lose_redis,
    outages,
    sequential_ms,
    steady_load,
)
from tests.coordination.slot_server import SlotServer  # noqa: E402

SERVERS, SLOTS, ANSWER_MS = 4, 3, 50  # 12 slots: 240 answers/s
NAMES = ("steady", "order", "outages", "kill", "cost")


async def measure(count: int, rate: float, seconds: float, only: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        async with AsyncExitStack() as stack:
            redis = RedisServer(Path(folder))
            stack.callback(redis.stop)
            await redis.start()
            servers = [await stack.enter_async_context(SlotServer(SLOTS).listening()) for _ in range(SERVERS)]
            gateways = await stack.enter_async_context(gateway_processes(count, servers, Path(folder), redis.url))
            print(f"{count} gateways, {SERVERS} servers of {SLOTS} slots, answers of {ANSWER_MS} ms")
            if "steady" in only:
                print(await steady_load(gateways, servers, rate=rate, answer_ms=ANSWER_MS, seconds=seconds))
            if "order" in only:
                order = await interactive_beside_batch(
                    gateways, servers, batch=400, answer_ms=ANSWER_MS, interactive=20
                )
                print(order)
            if "outages" in only:
                for name, (lose, restore) in outages(redis).items():
                    outage = await lose_redis(
                        gateways,
                        servers,
                        lose=lose,
                        restore=restore,
                        rate=rate,
                        answer_ms=ANSWER_MS,
                        away_s=3.0 if name != "flushed" else 0.0,
                    )
                    print(name, outage)
            if "kill" in only:
                print(
                    "kill: seconds until its places are free, failures:",
                    *await kill_gateway(gateways, servers, answer_ms=ANSWER_MS),
                )
        if "cost" in only:
            await measure_cost(Path(folder))


async def measure_cost(folder: Path, rounds: int = 8, each: int = 60, answer_ms: int = 4) -> None:
    """The time of sequential requests: without Redis, with a node that only one gateway uses, with one that two use,
    and while Redis is away. In turns, so that other load of the machine affects all alike."""
    async with AsyncExitStack() as stack:
        redis = RedisServer(folder)
        stack.callback(redis.stop)
        await redis.start()
        plain_server, own_server, shared_server, away_server = [
            await stack.enter_async_context(SlotServer(SLOTS).listening()) for _ in range(4)
        ]
        away_redis = f"unix://{folder / 'nobody.sock'}"
        setups = {
            "no redis": (1, plain_server, None),
            "alone": (1, own_server, redis.url),
            "shared": (2, shared_server, redis.url),
            "away": (1, away_server, away_redis),
        }
        times: dict[str, list[float]] = {name: [] for name in setups}
        running = {}
        for name, (count, server, url) in setups.items():
            own_folder = folder / name.replace(" ", "-")
            own_folder.mkdir()
            running[name] = await stack.enter_async_context(gateway_processes(count, [server], own_folder, url))
        for _ in range(rounds):
            for name, gateways in running.items():
                for other in gateways[1:]:
                    await other.ask("other", answer_ms=answer_ms)
                times[name] += await sequential_ms(gateways[0], count=each, answer_ms=answer_ms)
        base = percentile(times["no redis"], 0.5)
        for name, values in times.items():
            p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
            print(f"cost: {name:9} p50 {p50:.3f} ms ({p50 - base:+.3f}), p99 {p99:.3f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=list(NAMES))
    given = parser.parse_args()
    asyncio.run(measure(given.gateways, given.rate, given.seconds, given.only))
