"""Round trip of a small keep-alive HTTP request through each kind of tunnel, in one run, over a real sshd.

    python benchmarks/tunnel_rtt.py [--requests N] [--rounds N] [--apart [US]] [--json] [--check]

Rounds are interleaved, so that other load of the machine affects all routes alike. ``--check`` exits 1 unless each
gpumesh transport has a median of at most 2 x direct + 0.3 ms. With ``--apart`` below 500 us it must also be at least
40 times faster than stock ssh.

Nagle's algorithm holds back the second piece of an answer until the first is acknowledged. A head and a body that are
sent at once may be one piece for sshd, and the acknowledgement may come at once; that depends on microseconds and on
the kernel. With ``--apart`` the body comes a millisecond later, or the given number of microseconds. Then it always
has to wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import tempfile
import time
from pathlib import Path

from tunnel_routes import benchmark_setup, gpumesh_route, percentile, stock_ssh, stock_sshtunnel

from gpumesh.topology import TransportKind

AT_ONCE = b"GET /api/version HTTP/1.1\r\nHost: ollama\r\n\r\n"
APART = b"GET /api/version?apart=%d HTTP/1.1\r\nHost: ollama\r\n\r\n"
SHORT_US = 500  # above this, most of the time is the pause between the pieces, which no tunnel can shorten


class Client:
    """One keep-alive connection, blocking: an event loop here would be part of the measured time."""

    def __init__(self, port: int, request: bytes) -> None:
        self._request = request
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.times_ms: list[float] = []

    def requests(self, count: int, *, keep: bool = True) -> None:
        for _ in range(count):
            started_at = time.perf_counter()
            self._sock.sendall(self._request)
            answer = b""
            while not answer.endswith(b"}"):
                piece = self._sock.recv(65536)
                if not piece:
                    raise SystemExit("the tunnel closed the connection")
                answer += piece
            if keep:
                self.times_ms.append((time.perf_counter() - started_at) * 1000)

    def close(self) -> None:
        self._sock.close()


async def measure(requests: int, rounds: int, transports: list[str], request: bytes) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            sshd, pool, target = await stack.enter_async_context(benchmark_setup(Path(folder)))
            ports = {"direct": target}
            for kind in transports:
                route = gpumesh_route(sshd, pool, target, TransportKind(kind))
                ports[f"gpumesh {kind}"] = await stack.enter_async_context(route)
            ports["stock ssh -N -L"] = await stack.enter_async_context(stock_ssh(sshd, target))
            ports["stock sshtunnel"] = await stack.enter_async_context(stock_sshtunnel(sshd, target))
            clients = {name: Client(port, request) for name, port in ports.items()}
            for client in clients.values():
                client.requests(10, keep=False)
            for _ in range(rounds):
                for client in clients.values():
                    await asyncio.to_thread(client.requests, requests // rounds)
            for client in clients.values():
                client.close()
    figures = {
        name: {"p50_ms": percentile(client.times_ms, 0.5), "p99_ms": percentile(client.times_ms, 0.99)}
        for name, client in clients.items()
    }
    direct, stock = figures["direct"]["p50_ms"], figures["stock ssh -N -L"]["p50_ms"]
    for name, figure in figures.items():
        figure["times_direct"] = figure["p50_ms"] / direct
        figure["times_under_stock_ssh"] = stock / figure["p50_ms"]
        if name.startswith("gpumesh"):
            figure["goal_ms"] = 2 * direct + 0.3
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--transport", action="append", choices=[kind.value for kind in TransportKind])
    parser.add_argument(
        "--apart", type=int, nargs="?", const=1000, metavar="US", help="the body comes so much later (default: 1000 us)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    transports = arguments.transport or [kind.value for kind in TransportKind]
    request = AT_ONCE if arguments.apart is None else APART % arguments.apart
    figures = asyncio.run(measure(arguments.requests, arguments.rounds, transports, request))
    if arguments.json:
        print(json.dumps({"requests": arguments.requests, "routes": figures}, indent=2))
    else:
        print(f"{'route':<22}{'p50 ms':>9}{'p99 ms':>9}{'x direct':>10}{'goal ms':>9}{'under stock ssh':>17}")
        for name, figure in figures.items():
            goal = f"{figure['goal_ms']:>9.2f}" if "goal_ms" in figure else " " * 9
            under = f"{figure['times_under_stock_ssh']:>15.1f} x" if name.startswith("gpumesh") else ""
            row = f"{name:<22}{figure['p50_ms']:>9.2f}{figure['p99_ms']:>9.2f}{figure['times_direct']:>10.1f}"
            print(f"{row}{goal}{under}".rstrip())
    missed_goals = [name for name, figure in figures.items() if figure["p50_ms"] > figure.get("goal_ms", float("inf"))]
    if arguments.apart is not None and arguments.apart < SHORT_US:
        ours = [(name, figure) for name, figure in figures.items() if name.startswith("gpumesh")]
        missed_goals += [f"{name} (against stock ssh)" for name, figure in ours if figure["times_under_stock_ssh"] < 40]
    if missed_goals:
        print(f"missed: {', '.join(missed_goals)}", file=sys.stderr)
    return 1 if missed_goals and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
