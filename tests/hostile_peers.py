"""A peer that sends what nobody should, on a real socket, from a thread of its own: so that what it costs the event
loop under test is that loop's own work."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

ByteStream = Iterator[bytes]
TICK_S = 0.001  # between two looks at the CPU time
STALL_S = 0.1  # of CPU time: the other streams' longest wait for a turn of the loop


def repeat_bytes(start: bytes, unit: bytes, *, most: int = 64 << 20) -> ByteStream:
    """``start``, then ``unit`` again and again, in large pieces, up to ``most`` bytes."""
    yield start
    piece = unit * max((64 << 10) // len(unit), 1)
    for _ in range(most // len(piece)):
        yield piece


@dataclass
class HostileServer:
    """``answer`` gives the bytes for a request's path. ``sent`` counts those that the kernel took."""

    answer: Callable[[str], ByteStream]
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=64))
    sent: int = 0
    paths: list[str] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> HostileServer:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)

    def on_request(self, head: bytes) -> None:
        """Called for each request."""

    @property
    def connections(self) -> int:
        return len(self._sockets)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self._sockets.append(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), sock:
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (data := sock.recv(65536)):
                        return
                    head += data
                head, _, body = head.partition(b"\r\n\r\n")
                self.on_request(head)
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
                while len(body) < int(fields.get(b"content-length", b"0")):
                    body += sock.recv(65536)
                path = head.split()[1].decode()
                self.paths.append(path)
                for piece in self.answer(path):
                    sock.sendall(piece)
                    self.sent += len(piece)


@dataclass
class HostileBannerServer:
    """Says ``payload`` to whoever connects, unasked."""

    payload: Callable[[], ByteStream]
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    sent: int = 0
    _thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def __enter__(self) -> HostileBannerServer:
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        if self._thread is not None:
            self._thread.join(10)

    def _speak(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self.listener.accept()
            with sock:
                for piece in self.payload():
                    sock.sendall(piece)
                    self.sent += len(piece)


def json_answer(document: object) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def ollama_with_attack(model: str, attack: Callable[[], ByteStream]) -> Callable[[str], ByteStream]:
    """An Ollama that has ``model``, as far as probes see; what it answers to anything else is the attack."""
    tags = {"models": [{"name": model, "model": model, "size": 1}]}
    probes = {"/api/version": {"version": "0.12.6"}, "/api/tags": tags, "/api/ps": {"models": []}}

    def answer(path: str) -> ByteStream:
        return iter([json_answer(probes[path])]) if path in probes else attack()

    return answer


@contextlib.asynccontextmanager
async def track_longest_loop_turn() -> AsyncIterator[Callable[[], float]]:
    """The most CPU time, in s, that one turn of this event loop has taken, or up to ``TICK_S`` more: what another
    stream had to wait for it. CPU time, because how long a turn takes by the clock depends on what else the machine
    does."""
    largest = 0.0

    async def measure() -> None:
        nonlocal largest
        before = time.thread_time()
        while True:
            await asyncio.sleep(TICK_S)  # not 0: then the loop would never be idle, and each test would cost a core
            now = time.thread_time()
            largest = max(largest, now - before)
            before = now

    gc.collect()
    # As the running mesh does: a full collection would look through all that earlier tests left. It stays frozen: after
    # gc.unfreeze() each later collection would look through all modules and tests again.
    gc.freeze()
    measuring = asyncio.create_task(measure())
    try:
        await asyncio.sleep(0)
        yield lambda: largest
    finally:
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)


@dataclass
class HostileClients:
    """Each of ``count`` connections sends all of ``payload`` to ``port``. ``answers``: what came back on each that
    ended; one that the other side no longer reads has not."""

    port: int
    payload: Callable[[], ByteStream]
    count: int = 1
    sent: int = 0
    answers: list[bytes] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> HostileClients:
        for _ in range(self.count):
            sock = socket.create_connection(("127.0.0.1", self.port))
            self._sockets.append(sock)
            thread = threading.Thread(target=self._attack, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets:
            sock.close()

    def _attack(self, sock: socket.socket) -> None:
        answer = b""
        with contextlib.suppress(OSError):
            for piece in self.payload():
                sock.sendall(piece)
                self.sent += len(piece)
        with contextlib.suppress(OSError):
            while data := sock.recv(65536):
                answer += data
        self.answers.append(answer)

    @property
    def all_ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = HEAD + b"Content-Length: 1000000000\r\n\r\n"
EVENTS = LENGTH.replace(b"application/x-ndjson", b"text/event-stream")

UNFINISHED_ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "the value of a header": (HEAD + b"X-Long: ", b"a"),
    "the name of a header": (HEAD, b"a"),
    "headers": (HEAD, b"a: b\r\n"),
    "empty headers": (HEAD, b"a:\r\n"),
    "a reason": (b"HTTP/1.1 200 ", b"a"),
    "interim answers": (b"", b"HTTP/1.1 100 Go on\r\n\r\n"),
    "empty lines": (b"", b"\r\n"),
    "a chunk's extension": (CHUNKED + b"1;", b"a"),
    "a chunk's size": (CHUNKED, b"0"),
    "the value of a trailer": (CHUNKED + b"0\r\nX-Long: ", b"a"),
    "the name of a trailer": (CHUNKED + b"0\r\n", b"a"),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n"),
}
"""What of an answer never gets whole: how it begins, and what then comes without end."""

SMALL_PIECE_ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n"),
    "chunks of an empty line": (CHUNKED, b"1\r\n\n\r\n"),
    "chunks of two bytes": (CHUNKED, b"2\r\n{}\r\n"),
    "empty lines": (LENGTH, b"\n"),
    "small frames": (LENGTH, b"{}\n"),
    "small nonsense": (LENGTH, b"0\n"),
    "frames of tools": (LENGTH, b'{"tool_calls":[]}\n'),
    "a line without an end": (LENGTH, b"x" * 1000),
    "events": (EVENTS, b"data: 0\n\n"),
    "empty events": (EVENTS, b"\n"),
    "events of tools": (EVENTS, b'data: {"tool_calls":[]}\n\n'),
    "an event of many lines": (EVENTS, b"data:\n"),
}
"""What costs far more than its bytes."""


def _whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)) + body


_MILLIONS = b",".join([b"[]"] * (2 << 20))
COMPLETE_ANSWERS: dict[str, bytes] = {
    "lists in an answer": _whole(b'{"done":true,"eval_count":1,"context":[' + _MILLIONS + b"]}"),
    "empty lines in an answer": _whole(b"\n" * (16 << 20)),
    "lists in a frame": _whole(b'{"done":true,"context":[' + _MILLIONS + b"]}\n", b"application/x-ndjson"),
}
"""Answers of some MiB that would cost a second and some hundred MiB as Python's objects."""
