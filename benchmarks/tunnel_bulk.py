"""How many MB/s one connection carries through a tunnel, and its round trip: forward and reverse, both transports, over
a real sshd.

    python benchmarks/tunnel_bulk.py [--mib 256] [--rounds 3] [--json] [--check]

``to host`` are bytes from this machine to the host, ``from host`` the other way; they are the same work for a forward
and a reverse forward. ``head to worker``: through a reverse forward and then a forward, as the weights of a pool go.
The round trip is the median of 300 messages of 64 bytes that are echoed. Rounds are interleaved; the best of each route
counts. ``--check`` exits 1 unless each reverse rate is at least 90 % of the forward rate of the same transport and
direction. The peers run in a process of their own. Run as ``tunnel_bulk.py serve``, this file is that process and
prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tunnel_routes import child_server

from gpumesh.topology import Target, TransportKind
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest, ReverseForward
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.sshd import Sshd, listener, port_of_this_worker

CHUNK = bytes(1 << 20)
MESSAGE = bytes(64)
GOAL = 0.9


def serve_peer(connection: socket.socket) -> None:
    """Reads ``s`` (send) or ``r`` (receive) and a number of MiB, or ``e`` (echo) and a number of messages. Sends so
    many, receives them and answers, or echoes them."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = read_line(connection)
        kind, mib = request[:1], int(request[1:])
        if kind == b"e":
            for _ in range(mib):
                receive(connection, len(MESSAGE))
                connection.sendall(MESSAGE)
            return
        if kind == b"s":
            for _ in range(mib):
                connection.sendall(CHUNK)
        else:
            receive(connection, mib << 20)
        connection.sendall(b"!")


def read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1)
    return line


def receive(connection: socket.socket, count: int) -> None:
    buffer = bytearray(1 << 20)
    while count:
        received = connection.recv_into(buffer, min(count, len(buffer)))
        if not received:
            raise SystemExit("the tunnel closed the connection")
        count -= received


def serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)

        def accept() -> None:
            while True:
                connection, _peer = server.accept()
                threading.Thread(target=serve_peer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        sys.stdin.read()


def measure(port: int, mib: int, *, sends: bool) -> float:
    """MB/s of ``mib`` MiB that this process sends (``sends``) to the peer behind ``port``, or receives from it."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        started_at = time.perf_counter()
        connection.sendall(b"%s%d\n" % (b"r" if sends else b"s", mib))
        if sends:
            for _ in range(mib):
                connection.sendall(CHUNK)
        else:
            receive(connection, mib << 20)
        receive(connection, 1)
        return (mib << 20) / 1e6 / (time.perf_counter() - started_at)


def measure_round_trip_ms(port: int, count: int = 300) -> float:
    """The median round trip of a small message to the peer behind ``port``."""
    times_ms = []
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"e%d\n" % count)
        for _ in range(count):
            started_at = time.perf_counter()
            connection.sendall(MESSAGE)
            receive(connection, len(MESSAGE))
            times_ms.append((time.perf_counter() - started_at) * 1000)
    return statistics.median(times_ms)


@contextlib.asynccontextmanager
async def both_ways(sshd: Sshd, pool: WorkerPool, peer: int, transport: TransportKind) -> AsyncIterator[dict[str, int]]:
    """The ports that lead to the peer: through a forward, through a reverse forward, and through both."""
    control = sshd.folder / f"control-{transport}"
    control.mkdir(mode=0o700, exist_ok=True)
    ssh = sshd.spec(transport=transport)
    with listener() as local:
        forward = local.getsockname()[1]
        reverse, through_us = port_of_this_worker(), port_of_this_worker()
        setup = ConnectRequest("bench", ssh, (Target("127.0.0.1", peer),), control_dir=str(control))
        async with await pool.spawn(setup, [local]) as worker, contextlib.AsyncExitStack() as stack:
            assert isinstance(await worker.receive(), ConnectionInfo)
            head_control = sshd.folder / f"head-{transport}"
            head_control.mkdir(mode=0o700, exist_ok=True)
            unused = stack.enter_context(listener())
            head_setup = ConnectRequest(
                "head",
                ssh,
                (Target("127.0.0.1", 1),),
                control_dir=str(head_control),
                reverse_forwards=(ReverseForward(reverse, peer), ReverseForward(through_us, forward)),
            )
            head = await stack.enter_async_context(await pool.spawn(head_setup, [unused]))
            message = await head.receive()
            if not isinstance(message, ConnectionInfo):
                raise SystemExit(f"{transport}: {message}")
            yield {"forward": forward, "reverse": reverse, "head to worker": through_us}


async def run(mib: int, rounds: int) -> dict[str, float]:
    """MB/s of each route and direction, and ms of each round trip, by their names."""
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            Sshd(Path(folder) / "sshd", {"LogLevel": "ERROR"}) as sshd,
            WorkerPool(stderr=None) as pool,
            child_server(sys.executable, __file__, "serve") as peer,
            contextlib.AsyncExitStack() as stack,
        ):
            routes = {"no tunnel": {"forward": peer}}
            for transport in TransportKind:
                routes[transport.value] = await stack.enter_async_context(both_ways(sshd, pool, peer, transport))
            for _ in range(rounds):
                for transport_name, ports in routes.items():
                    for route, port in ports.items():
                        rtt_ms = await asyncio.to_thread(measure_round_trip_ms, port)
                        name = f"{transport_name}, {route}, round trip"
                        best[name] = min(best.get(name, rtt_ms), round(rtt_ms, 3))
                        for sends in (True, False):
                            # Through a reverse forward, this process plays the host.
                            to_host = sends is (route == "forward")
                            direction = "to host" if to_host else "from host"
                            if route == "head to worker":
                                direction = "to worker" if sends else "to head"
                            name = f"{transport_name}, {route}, {direction}"
                            rate = await asyncio.to_thread(measure, port, mib, sends=sends)
                            best[name] = max(best.get(name, 0.0), round(rate, 1))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="?", choices=["serve"])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.role:
        serve()
        return
    rates = asyncio.run(run(arguments.mib, arguments.rounds))
    if arguments.json:
        print(json.dumps(rates, indent=2))
    else:
        for name, rate in rates.items():
            print(f"{name:<42} {rate:>9.3f} ms" if name.endswith("round trip") else f"{name:<42} {rate:>9.1f} MB/s")
    if arguments.check:
        for transport in TransportKind:
            for direction in ("to host", "from host"):
                forward = rates[f"{transport.value}, forward, {direction}"]
                reverse = rates[f"{transport.value}, reverse, {direction}"]
                if reverse < GOAL * forward:
                    raise SystemExit(f"{transport.value} {direction}: reverse {reverse} MB/s, forward {forward} MB/s")


if __name__ == "__main__":
    main()
