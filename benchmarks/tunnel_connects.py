"""What it costs to see whose a new connection to a tunnel's port is, in one run.

    python benchmarks/tunnel_connects.py [--connections N] [--rounds N] [--sockets 10,1000,10000]

First the lookup alone, with so many TCP sockets on the machine: by sock_diag, and by /proc/net/tcp, which is read where
there is no sock_diag. Then a new connection with one small request through each transport, over a real sshd, by ports
that are kept to their user and by ports that are shared, in turns.
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

from tunnel_routes import gpumesh_route, percentile, setting

from gpumesh.topology import TransportKind
from gpumesh.tunnels.local_system.peer_users import OwnUserFilter
from gpumesh.tunnels.local_system.socket_lookup import ProcNet, SockDiag

REQUEST = b"GET /api/version HTTP/1.1\r\nHost: ollama\r\n\r\n"


def lookups(sockets: list[int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{'sockets':>8}{'sock_diag us':>14}{'/proc us':>10}")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        made = 0
        for number in sockets:
            while made < number:
                stack.enter_context(socket.create_connection(listener.getsockname()))
                accepted, peer = listener.accept()
                stack.enter_context(accepted)
                made += 2
            print(f"{number:>8}{cost_us(SockDiag(), accepted, peer, 2000):>14.1f}", end="")
            print(f"{cost_us(ProcNet(), accepted, peer, 20):>10.1f}", flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cost_us(lookup: SockDiag | ProcNet, accepted: socket.socket, peer: object, times: int) -> float:
    """CPU time of one, the best of five rounds."""
    own = OwnUserFilter(lookup, lambda *_: None)
    took = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(times):
            if not own.allows(accepted, peer):
                raise SystemExit("our own connection was refused")
        took.append((time.process_time() - began) / times * 1e6)
    own.close()
    return min(took)


def connect_and_ask(port: int, times: int) -> list[float]:
    """ms for each."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(REQUEST)
            answer = b""
            while not answer.endswith(b"}"):
                piece = sock.recv(65536)
                if not piece:
                    raise SystemExit("the tunnel closed the connection")
                answer += piece
        took.append((time.perf_counter() - began) * 1000)
    return took


async def connections(count: int, rounds: int) -> None:
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            sshd, pool, target = await stack.enter_async_context(setting(Path(folder)))
            ports = {"direct": target}
            for kind in TransportKind:
                for share in (True, False):
                    route = gpumesh_route(sshd, pool, target, kind, share=share)
                    ports[f"{kind}, {'shared' if share else 'own user'}"] = await stack.enter_async_context(route)
            for name, port in ports.items():
                took[name] = []
                await asyncio.to_thread(connect_and_ask, port, 20)
            for number in range(rounds):
                for name, port in list(ports.items())[:: 1 if number % 2 else -1]:
                    took[name] += await asyncio.to_thread(connect_and_ask, port, count // rounds)
    print(f"\n{'a connection and its request':<30}{'p50 ms':>9}{'p99 ms':>9}")
    for name, times in took.items():
        print(f"{name:<30}{percentile(times, 0.5):>9.3f}{percentile(times, 0.99):>9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sockets", default="10,1000,10000")
    arguments = parser.parse_args()
    lookups([int(number) for number in arguments.sockets.split(",")])
    asyncio.run(connections(arguments.connections, arguments.rounds))


if __name__ == "__main__":
    main()
