"""A stand-in Ollama that answers faster than nginx forwards, so that the proxy in front of it limits the figures.

The lab's stand-in simulates slots, loads and faults. This stand-in does two things only, as cheaply as Python can:
``POST /api/chat`` with ``stream: false`` is answered at once, and with ``stream: true`` gives ``options.num_predict``
tokens at ``options.rate`` tokens/s. The content of each token is the time at which it was sent (monotonic clock, ns),
so a client on the same machine knows the delay of each token. ``GET /truth`` returns the times of the streams that have
ended since the last such request, as the server knows them (``TRUTH``), and forgets them.

Run as a process: ``python benchmarks/fast_ollama.py [--apart US] [--first-token MS] PORT`` (0: any; the port is
printed on the first line). With ``--apart`` the body of an answer in one piece is a write of its own, US microseconds
after the head. Most servers write it so, and Nagle's algorithm in a stock ssh tunnel holds back the second write (see
tunnel_rtt.py). The first token of a stream comes after ``--first-token``, by default after the time of one token."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from functools import partial
from typing import cast

import uvloop

MODEL = "bench:1b"


def _answer(body: bytes, kind: bytes = b"application/json; charset=utf-8") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


_COUNTERS = (
    b'"done":true,"done_reason":"stop","total_duration":1000000,"load_duration":1000,"prompt_eval_count":8,'
    b'"prompt_eval_duration":1000,"eval_count":%d,"eval_duration":%d}'
)
_HEAD = b'{"model":"bench:1b","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"'
WHOLE = _answer(_HEAD + b'Hello."},' + _COUNTERS % (2, 1000000))
VERSION = _answer(b'{"version":"0.12.6"}')
TAGS = _answer(
    b'{"models":[{"name":"bench:1b","model":"bench:1b","modified_at":"2026-01-01T00:00:00.123456789Z","size":1073741824,'
    b'"digest":"0","details":{"family":"bench","parameter_size":"1B","quantization_level":"Q4_K_M"}}]}'
)
PS = _answer(b'{"models":[]}')
ROOT = _answer(b"Ollama is running", b"text/plain; charset=utf-8")
MISSING = (
    b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n" + b'{"error":"not found"}'
)
REFUSED = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    + b'{"error":"bad JSON"}'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
# Of each stream that has ended: when its request came, when its first and its last token were sent (seconds on
# ``time.perf_counter``), and how many tokens it had.
TRUTH: list[tuple[float, float, float, int]] = []
GETS = {b"/": ROOT, b"/api/version": VERSION, b"/api/tags": TAGS, b"/api/ps": PS}


def _chunk(line: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(line), line)


class FastOllama(asyncio.Protocol):
    """The connection of one client. Requests are answered in sequence: a second, pipelined request waits in the
    buffer."""

    def __init__(self, apart_s: float | None, first_token_s: float | None) -> None:
        self._apart_s = apart_s
        self._first_token_s = first_token_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._tokens = 0
        self._sent = 0
        self._start = 0.0
        self._received = self._first = 0.0
        self._gap = 0.01

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while self._timer is None and self._transport is not None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end]
            length = 0
            at = head.lower().find(b"content-length:")
            if at >= 0:
                stop = head.find(b"\r", at)
                length = int(head[at + 15 : stop if stop >= 0 else len(head)])
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            method, path, _ = head[: head.find(b"\r\n")].split(b" ", 2)
            self._serve(self._transport, method, path, body)

    def _serve(self, transport: asyncio.Transport, method: bytes, path: bytes, body: bytes) -> None:
        if path == b"/truth":
            transport.write(_answer(json.dumps(TRUTH).encode()))
            TRUTH.clear()
        elif method != b"POST":
            transport.write(GETS.get(path, MISSING))
        elif path not in (b"/api/chat", b"/api/generate"):
            transport.write(MISSING)
        elif b'"stream":false' in body or b'"stream": false' in body:
            if self._apart_s is None:
                transport.write(WHOLE)
            else:
                head, _, rest = WHOLE.partition(b"\r\n\r\n")
                transport.write(head + b"\r\n\r\n")
                time.sleep(self._apart_s)  # the loop's timers count in milliseconds; nobody else is being served
                transport.write(rest)
        else:
            try:
                options = json.loads(body).get("options", {})
                self._tokens, self._sent = int(options.get("num_predict", 100)), 0
                self._gap = 1.0 / float(options.get("rate", 100.0))
            except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):  # of the fuzzer's
                transport.write(REFUSED)
                return
            transport.write(STREAM_HEAD)
            first_token_s = self._gap if self._first_token_s is None else self._first_token_s
            self._received = time.perf_counter()
            self._start = self._loop.time() + first_token_s - self._gap
            self._timer = self._loop.call_at(self._start + self._gap, self._tick)

    def _tick(self) -> None:
        transport = self._transport
        if transport is None:
            return
        self._sent += 1
        if self._sent == 1:
            self._first = time.perf_counter()
        line = _HEAD + b'%d "},"done":false}\n' % time.monotonic_ns()
        if self._sent < self._tokens:
            transport.write(_chunk(line))
            self._timer = self._loop.call_at(self._start + (self._sent + 1) * self._gap, self._tick)
            return
        final = _HEAD + b'"},' + _COUNTERS % (self._tokens, int(self._tokens * self._gap * 1e9)) + b"\n"
        transport.write(_chunk(line) + _chunk(final) + b"0\r\n\r\n")
        self._timer = None
        TRUTH.append((self._received, self._first, time.perf_counter(), self._tokens))
        if self._buffer:
            self.data_received(b"")


async def main(port: int, apart_s: float | None, first_token_s: float | None) -> None:
    new = partial(FastOllama, apart_s, first_token_s)
    server = await asyncio.get_running_loop().create_server(new, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int, nargs="?", default=0)
    parser.add_argument("--apart", type=float, metavar="US")
    parser.add_argument("--first-token", type=float, metavar="MS")
    given = parser.parse_args()
    apart_s = None if given.apart is None else given.apart / 1e6
    uvloop.run(main(given.port, apart_s, None if given.first_token is None else given.first_token / 1e3))
