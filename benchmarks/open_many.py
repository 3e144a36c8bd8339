"""Measures the time until many nodes are up, opened concurrently as `gpumesh up` does it, over one real sshd.

    python benchmarks/open_many.py [--nodes 32] [--transport sshtunnel] [--slow-ms 1500] [--rounds N] [--json] [--check]

One of the nodes is slow: a proxy in front of its sshd delays the greeting by ``--slow-ms``. First each kind of node is
opened alone, then all nodes at once. ``--check`` exits 1 unless all nodes are up within the time of the slow node alone
+ 0.5 s. All hosts are this machine, which computes both sides of every key exchange. Real hosts compute their own side.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tunnel_routes import benchmark_setup

from gpumesh.topology import BackendSpec, NodeSpec, SshSpec, Target, TransportKind
from gpumesh.tunnels.supervisor import open_tunnel, run_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.sshd import Sshd

ALLOWED_S = 0.5


@dataclass(frozen=True)
class Figures:
    """Seconds. ``first_s`` is when the first node was up: a prompt need not wait for the rest."""

    transport: str
    nodes: int
    alone_s: float
    slowest_alone_s: float
    first_s: float
    all_s: float

    @property
    def over_s(self) -> float:
        return self.all_s - self.slowest_alone_s


@contextlib.asynccontextmanager
async def slow_port_to(sshd: Sshd, delay_s: float) -> AsyncIterator[int]:
    """A port that leads to the sshd, with a delayed greeting."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay_s)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", sshd.port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def time_to_open(pool: WorkerPool, specs: list[SshSpec], target: int) -> list[float]:
    """The seconds after which each node was up, sorted."""
    async with contextlib.AsyncExitStack() as stack:
        started_at = time.perf_counter()
        tunnels = [
            await stack.enter_async_context(
                run_tunnel(
                    open_tunnel(
                        NodeSpec(f"n{number}", BackendSpec(targets=(Target("127.0.0.1", target),)), spec),
                        rng=random.Random(number),
                        workers=pool,
                        on_change=lambda _: None,
                    )
                )
            )
            for number, spec in enumerate(specs)
        ]

        async def measure_up(number: int) -> float:
            await tunnels[number].wait_up()
            return time.perf_counter() - started_at

        return sorted(await asyncio.gather(*(measure_up(number) for number in range(len(tunnels)))))


async def measure(transport: TransportKind, nodes: int, slow_s: float, rounds: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        async with benchmark_setup(Path(folder)) as (sshd, pool, target), slow_port_to(sshd, slow_s) as slow_port:
            known_hosts = sshd.known_hosts.read_text()
            sshd.known_hosts.write_text(known_hosts + known_hosts.replace(f":{sshd.port} ", f":{slow_port} "))
            usual = sshd.spec(transport=transport, connect_timeout_s=30.0)
            slow = sshd.spec(transport=transport, connect_timeout_s=30.0, port=slow_port)
            await pool.prestart()
            await time_to_open(pool, [usual], target)  # warm-up
            alone = [(await time_to_open(pool, [usual], target))[-1] for _ in range(5)]
            slowest = [(await time_to_open(pool, [slow], target))[-1] for _ in range(2)]
            together = [await time_to_open(pool, [*[usual] * (nodes - 1), slow], target) for _ in range(rounds)]
            best = min(together, key=lambda times: times[-1])
            return Figures(transport.value, nodes, sorted(alone)[2], max(slowest), best[0], best[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--transport", action="append", choices=[kind.value for kind in TransportKind])
    parser.add_argument("--slow-ms", type=float, default=1500.0)
    parser.add_argument("--rounds", type=int, default=3, help="the best counts: other load only adds time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    results = [
        asyncio.run(measure(TransportKind(kind), arguments.nodes, arguments.slow_ms / 1000, arguments.rounds))
        for kind in arguments.transport or [kind.value for kind in TransportKind]
    ]
    if arguments.json:
        print(json.dumps({"runs": [{**asdict(figures), "over_s": figures.over_s} for figures in results]}, indent=2))
    else:
        print(
            f"{'transport':<12}{'nodes':>6}{'one alone':>11}{'slowest':>9}{'first up':>10}{'all up':>8}{'over':>7}  (s)"
        )
        for figures in results:
            print(
                f"{figures.transport:<12}{figures.nodes:>6}{figures.alone_s:>11.2f}{figures.slowest_alone_s:>9.2f}{figures.first_s:>10.2f}"
                f"{figures.all_s:>8.2f}{figures.over_s:>7.2f}"
            )
    too_slow = [figures.transport for figures in results if figures.over_s > ALLOWED_S]
    if too_slow:
        print(f"more than the slowest + {ALLOWED_S:g} s: {', '.join(too_slow)}", file=sys.stderr)
    return 1 if too_slow and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
