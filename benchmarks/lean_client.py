"""A load client that uses less CPU than the servers that it measures: keep-alive HTTP/1.1 on ``asyncio.Protocol`` and
uvloop.

Three measurements against one URL, each printed as a line of JSON by ``python benchmarks/lean_client.py``:

- ``sequential``: one request after the other on one connection; p50 and p99 of the round trip in ms.
- ``throughput``: N connections, each of which sends its next request when its last is answered; requests/s.
- ``streams``: N streams of tokens at once; wall time, errors, token delay p50 and p99 in ms.

``busy`` is the client's own CPU time ÷ wall time: near 1 the client, not the server, limits the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast
from urllib.parse import urlsplit

import uvloop

MODEL = "bench:1b"
BODY = json.dumps({"model": MODEL, "stream": False, "messages": [{"role": "user", "content": "Say hello."}]}).encode()


def stream_body(tokens: int, rate: float) -> bytes:
    options = {"num_predict": tokens, "rate": rate}
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "Go."}], "stream": True, "options": options}
    ).encode()


def request(host: str, body: bytes, path: str = "/api/chat") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """Calls ``on_answer(status)`` for each complete answer, and with 0 when the connection has ended.

    ``on_data`` gets the raw bytes of a stream as they come.
    """

    def __init__(self, on_answer: Callable[[int], None], on_data: Callable[[bytes], None] | None = None) -> None:
        self._on_answer = on_answer
        self._on_data = on_data
        self.transport: asyncio.Transport | None = None
        self._buffer = b""
        self._status = 0
        self._missing: int | None = None  # bytes of the body still to come; None: in the head; -1: chunked
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self.transport = None
        self._on_answer(0)

    def data_received(self, data: bytes) -> None:
        if self._missing is None:
            self._buffer = self._buffer + data if self._buffer else data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end].lower()
            data, self._buffer = self._buffer[end + 4 :], b""
            self._status = int(head[9:12])
            at = head.find(b"\r\ncontent-length:")
            if at >= 0:
                stop = head.find(b"\r", at + 2)
                self._missing = int(head[at + 17 : stop if stop >= 0 else len(head)])
            else:
                self._missing, self._tail = -1, b""
        if self._missing >= 0:
            self._missing -= len(data)
            if self._missing <= 0:
                self._finish_answer()
            return
        if self._on_data is not None and data:
            self._on_data(data)
        # The end of a chunked body: an empty chunk. Our tokens are JSON lines, which hold no bare CR LF.
        tail = self._tail + data[-7:]
        self._tail = tail[-7:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._finish_answer()

    def _finish_answer(self) -> None:
        self._missing = None
        self._on_answer(self._status)


def _identity(connection: Connection) -> Connection:
    """Makes a factory for ``create_connection`` of a connection that exists already."""
    return connection


@dataclass(frozen=True, slots=True)
class Sequential:
    p50_ms: float
    p99_ms: float
    errors: int


@dataclass(frozen=True, slots=True)
class Throughput:
    """``answered`` counts all requests. ``requests_per_s`` leaves out those of the warm-up."""

    requests_per_s: float
    answered: int
    errors: int
    busy: float


@dataclass(frozen=True, slots=True)
class Streams:
    """``finished_s``: the time until the last stream ended; the ideal is tokens ÷ rate."""

    finished_s: float
    errors: int
    tokens: int
    delay_p50_ms: float
    delay_p99_ms: float
    busy: float


def percentile(ordered: list[float], share: float) -> float:
    """The percentile by nearest rank; NaN for an empty list."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


async def sequential(host: str, port: int, count: int, warm_up: int = 50, path: str = "/api/chat") -> Sequential:
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[int] = loop.create_future()

    def on_answer(status: int) -> None:
        if not answered.done():
            answered.set_result(status)

    transport, _ = await loop.create_connection(lambda: Connection(on_answer), host, port)
    message, times, errors = request(f"{host}:{port}", BODY, path), [], 0
    try:
        for index in range(count + warm_up):
            answered = loop.create_future()
            start = time.perf_counter()
            transport.write(message)
            async with asyncio.timeout(30):
                status = await answered
            errors += status != 200
            if status == 0:
                break
            if index >= warm_up:
                times.append((time.perf_counter() - start) * 1e3)
    finally:
        transport.close()
    times.sort()
    return Sequential(percentile(times, 0.5), percentile(times, 0.99), errors)


async def throughput(
    host: str, port: int, in_flight: int, seconds: float, warm_up_s: float = 0.5, path: str = "/api/chat"
) -> Throughput:
    loop = asyncio.get_running_loop()
    message = request(f"{host}:{port}", BODY, path)
    served = errors = 0
    running = True
    connections: list[Connection] = []

    def send_next_on(index: int) -> Callable[[int], None]:
        """The callback of a connection: counts its answer and sends the next request on it."""

        def on_answer(status: int) -> None:
            nonlocal served, errors
            if not running:
                return
            if status == 200:
                served += 1
            else:
                errors += 1
            transport = connections[index].transport
            if transport is not None:
                transport.write(message)

        return on_answer

    for index in range(in_flight):
        connection = Connection(send_next_on(index))
        await loop.create_connection(partial(_identity, connection), host, port)
        connections.append(connection)
    for connection in connections:
        assert connection.transport is not None
        connection.transport.write(message)
    await asyncio.sleep(warm_up_s)
    warm_up_served, started_at, cpu_start_s = served, time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    wall_s = time.perf_counter() - started_at
    running = False
    cpu_s = time.process_time() - cpu_start_s
    result = Throughput((served - warm_up_served) / wall_s, served, errors, cpu_s / wall_s)
    for connection in connections:
        if connection.transport is not None:
            connection.transport.close()
    return result


_STAMP = b'"content":"'


async def streams(host: str, port: int, count: int, tokens: int, rate: float, spread_s: float = 0.0) -> Streams:
    """``spread_s``: the streams start over this time rather than in one instant, as clients do."""
    loop = asyncio.get_running_loop()
    message = request(f"{host}:{port}", stream_body(tokens, rate))
    delays: list[float] = []
    errors = 0

    async def run_stream(index: int) -> None:
        nonlocal errors
        await asyncio.sleep(spread_s * index / count)
        ended: asyncio.Future[int] = loop.create_future()
        received = 0

        def on_data(data: bytes) -> None:
            nonlocal received
            now = time.monotonic_ns()
            at = data.find(_STAMP)
            while at >= 0:
                at += len(_STAMP)
                stop = data.find(b" ", at, at + 24)
                if stop > at:
                    received += 1
                    delays.append((now - int(data[at:stop])) / 1e6)
                at = data.find(_STAMP, at)

        def on_answer(status: int) -> None:
            if not ended.done():
                ended.set_result(status)

        try:
            transport, _ = await loop.create_connection(lambda: Connection(on_answer, on_data), host, port)
        except OSError:
            errors += 1
            return
        try:
            transport.write(message)
            async with asyncio.timeout(tokens / rate * 20 + 30):
                status = await ended
            # A token whose stamp was cut in two by the network is not timed; more than a few means lost tokens.
            errors += status != 200 or received < tokens * 0.95
        except TimeoutError:
            errors += 1
        finally:
            transport.close()

    started_at, cpu_start_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(run_stream(index) for index in range(count)))
    wall_s = time.perf_counter() - started_at
    delays.sort()
    return Streams(
        wall_s - spread_s,
        errors,
        len(delays),
        percentile(delays, 0.5),
        percentile(delays, 0.99),
        (time.process_time() - cpu_start_s) / wall_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["sequential", "throughput", "streams"])
    parser.add_argument("url")
    parser.add_argument("-n", type=int, default=1000, help="requests (sequential), in flight or streams at once")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--path", default="/api/chat", help="for sequential and throughput")
    given = parser.parse_args()
    parts = urlsplit(given.url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    if given.kind == "sequential":
        result: Sequential | Throughput | Streams = uvloop.run(sequential(host, port, given.n, path=given.path))
    elif given.kind == "throughput":
        result = uvloop.run(throughput(host, port, given.n, given.seconds, path=given.path))
    else:
        result = uvloop.run(streams(host, port, given.n, given.tokens, given.rate, given.spread))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
