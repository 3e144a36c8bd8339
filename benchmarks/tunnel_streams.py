"""Many streams of tokens at once through one tunnel, all routes in one run, over a real sshd.

    python benchmarks/tunnel_streams.py [--streams 32,128,256] [--tokens 200] [--rate 100] [--stock] [--json] [--check]

For each route and number of streams: the wall time (ideal: tokens / rate), streams that failed, and the delay of a
token from the moment at which it should have been sent (p50, p99). ``--check`` exits 1 unless each gpumesh transport
has no error, takes at most 10 % longer than the direct route, and has a p99 of at most 10 ms, up to 256 streams. No
other load may run: sshd, tunnel, server and clients share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tunnel_routes import benchmark_setup, gpumesh_route, percentile, stock_ssh, stock_sshtunnel

from gpumesh.topology import TransportKind

GOAL_STREAMS, GOAL_LONGER, GOAL_P99_MS = 256, 0.10, 10.0


@dataclass
class Result:
    route: str
    streams: int
    seconds: float = 0.0
    errors: int = 0
    delay_p50_ms: float = 0.0
    delay_p99_ms: float = 0.0
    delays_ms: list[float] = field(default_factory=list, repr=False)


class Reader(asyncio.Protocol):
    """One stream: sends the request and records each token's delay. ``done``: whether all tokens came."""

    def __init__(self, request: bytes, tokens: int, delays_ms: list[float]) -> None:
        self._request = request
        self._missing = tokens
        self._delays_ms = delays_ms
        self._buffer = b""
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if len(line) == 20 and line.isdigit():
                self._delays_ms.append((now - int(line)) / 1e6)
                self._missing -= 1
        if self._missing == 0 and not self.done.done():
            self.done.set_result(True)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(False)


async def run(route: str, port: int, streams: int, tokens: int, rate: int) -> Result:
    result = Result(route, streams)
    request = b"GET /stream?tokens=%d&rate=%d HTTP/1.1\r\nHost: x\r\n\r\n" % (tokens, rate)
    loop = asyncio.get_running_loop()
    gc.collect()
    started_at = time.monotonic()

    async def run_stream() -> bool:
        try:
            async with asyncio.timeout(20 * tokens / rate + 30):
                transport, reader = await loop.create_connection(
                    lambda: Reader(request, tokens, result.delays_ms), "127.0.0.1", port
                )
                with contextlib.closing(transport):
                    return await reader.done
        except OSError:
            return False

    completed = await asyncio.gather(*(run_stream() for _ in range(streams)))
    result.seconds = time.monotonic() - started_at
    result.errors = completed.count(False)
    if result.delays_ms:
        result.delay_p50_ms = percentile(result.delays_ms, 0.5)
        result.delay_p99_ms = percentile(result.delays_ms, 0.99)
    return result


async def measure(arguments: argparse.Namespace) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            sshd, pool, target = await stack.enter_async_context(benchmark_setup(Path(folder)))
            ports = {"direct": target}
            for kind in arguments.transport or [kind.value for kind in TransportKind]:
                route = gpumesh_route(sshd, pool, target, TransportKind(kind))
                ports[f"gpumesh {kind}"] = await stack.enter_async_context(route)
            if arguments.stock:
                ports["stock ssh -N -L"] = await stack.enter_async_context(stock_ssh(sshd, target))
                ports["stock sshtunnel"] = await stack.enter_async_context(stock_sshtunnel(sshd, target))
            for streams in (int(number) for number in arguments.streams.split(",")):
                for name, port in ports.items():
                    result = await run(name, port, streams, arguments.tokens, arguments.rate)
                    results.append(result)
                    if not arguments.json:
                        print(
                            f"{streams:>5} streams  {name:<20} {result.seconds:>7.2f} s  {result.errors:>4} errors"
                            f"  delay p50 {result.delay_p50_ms:>7.1f}  p99 {result.delay_p99_ms:>7.1f} ms",
                            flush=True,
                        )
    return results


def list_missed_goals(results: list[Result]) -> Iterator[str]:
    """A sentence for each goal that was missed."""
    direct = {result.streams: result.seconds for result in results if result.route == "direct"}
    for result in results:
        if not result.route.startswith("gpumesh") or result.streams > GOAL_STREAMS:
            continue
        subject = f"{result.streams} streams, {result.route}"
        if result.seconds > direct[result.streams] * (1 + GOAL_LONGER):
            yield f"{subject}: {result.seconds:.2f} s, where the direct route took {direct[result.streams]:.2f} s"
        if result.delay_p99_ms > GOAL_P99_MS:
            yield f"{subject}: a token delay of {result.delay_p99_ms:.1f} ms at p99"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="32,128,256")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rate", type=int, default=100)
    parser.add_argument("--transport", action="append", choices=[kind.value for kind in TransportKind])
    parser.add_argument("--stock", action="store_true", help="also stock ssh and stock sshtunnel (slow)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    results = asyncio.run(measure(arguments := parser.parse_args()))
    if arguments.json:
        rows = [{name: value for name, value in asdict(result).items() if name != "delays_ms"} for result in results]
        print(json.dumps({"tokens": arguments.tokens, "rate": arguments.rate, "runs": rows}, indent=2))
    missed_goals = list(list_missed_goals(results)) if arguments.check else []
    for miss in missed_goals:
        print(miss, file=sys.stderr)
    return 1 if missed_goals or any(result.errors for result in results if result.route.startswith("gpumesh")) else 0


if __name__ == "__main__":
    sys.exit(main())
