"""Measures the cost of looking up the user of a new connection to a tunnel's port.

    python benchmarks/tunnel_connects.py [--connections N] [--rounds N] [--sockets 10,1000,10000]

First the lookup alone is measured, with the given numbers of TCP sockets on the machine: by sock_diag, and by
/proc/net/tcp, which is used where there is no sock_diag. Then a new connection with one small request is measured
through each transport over a real sshd, in turns with ports for their own user only and with shared ports.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import socket
import tempfile
import time
from pathlib import Path

from tunnel_routes import benchmark_setup, gpumesh_route, percentile

from gpumesh.topology import TransportKind
from gpumesh.tunnels.local_system.peer_users import OwnUserFilter
from gpumesh.tunnels.local_system.socket_lookup import ProcNet, SockDiag

REQUEST = b"GET /api/version HTTP/1.1\r\nHost: ollama\r\n\r\n"


def measure_lookups(sockets: list[int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{'sockets':>8}{'sock_diag us':>14}{'/proc us':>10}")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        socket_count = 0
        for number in sockets:
            while socket_count < number:
                stack.enter_context(socket.create_connection(listener.getsockname()))
                accepted, peer = listener.accept()
                stack.enter_context(accepted)
                socket_count += 2
            print(f"{number:>8}{cost_us(SockDiag(), accepted, peer, 2000):>14.1f}", end="")
            print(f"{cost_us(ProcNet(), accepted, peer, 20):>10.1f}", flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cost_us(lookup: SockDiag | ProcNet, accepted: socket.socket, peer: object, times: int) -> float:
    """CPU time of one lookup, the best of five rounds."""
    own_user_filter = OwnUserFilter(lookup, lambda *_: None)
    costs_us = []
    for _ in range(5):
        started_at = time.process_time()
        for _ in range(times):
            if not own_user_filter.allows(accepted, peer):
                raise SystemExit("our own connection was refused")
        costs_us.append((time.process_time() - started_at) / times * 1e6)
    own_user_filter.close()
    return min(costs_us)


def connect_and_ask(port: int, times: int) -> list[float]:
    """The milliseconds of each connection with its request."""
    times_ms = []
    for _ in range(times):
        started_at = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(REQUEST)
            answer = b""
            while not answer.endswith(b"}"):
                piece = sock.recv(65536)
                if not piece:
                    raise SystemExit("the tunnel closed the connection")
                answer += piece
        times_ms.append((time.perf_counter() - started_at) * 1000)
    return times_ms


async def measure_connections(count: int, rounds: int) -> None:
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            sshd, pool, target = await stack.enter_async_context(benchmark_setup(Path(folder)))
            ports = {"direct": target}
            for kind in TransportKind:
                for share in (True, False):
                    route = gpumesh_route(sshd, pool, target, kind, share=share)
                    ports[f"{kind}, {'shared' if share else 'own user'}"] = await stack.enter_async_context(route)
            for name, port in ports.items():
                times[name] = []
                await asyncio.to_thread(connect_and_ask, port, 20)
            for number in range(rounds):
                for name, port in list(ports.items())[:: 1 if number % 2 else -1]:
                    times[name] += await asyncio.to_thread(connect_and_ask, port, count // rounds)
    print(f"\n{'a connection and its request':<30}{'p50 ms':>9}{'p99 ms':>9}")
    for name, values in times.items():
        print(f"{name:<30}{percentile(values, 0.5):>9.3f}{percentile(values, 0.99):>9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sockets", default="10,1000,10000")
    arguments = parser.parse_args()
    measure_lookups([int(number) for number in arguments.sockets.split(",")])
    asyncio.run(measure_connections(arguments.connections, arguments.rounds))


if __name__ == "__main__":
    main()
