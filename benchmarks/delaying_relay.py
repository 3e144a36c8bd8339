"""A link with a distance: passes TCP connections on, each piece after half a round trip, at a given bandwidth.

    python benchmarks/delaying_relay.py TARGET_PORT [--rtt-ms MS] [--mbit RATE] [--window-kib KIB]

Prints its own port first. For each line on its input it prints one line of JSON: what has gone through since the last
line, with llama.cpp's RPC commands counted. It ends with its input. ``--window-kib`` bounds what is under way in each
direction until its acknowledgement would be back, as the window of a TCP connection does.

It waits in select(), whose time-outs have microseconds. (Those of epoll, and so of asyncio, have milliseconds.)
"""

from __future__ import annotations

import argparse
import collections
import json
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

READ_BYTES = 256 << 10
# The commands of ggml-rpc.cpp by their number (enum rpc_cmd). The head waits for an answer to all but NO_ANSWER.
COMMANDS = [
    *("ALLOC_BUFFER", "GET_ALIGNMENT", "GET_MAX_SIZE", "BUFFER_GET_BASE", "FREE_BUFFER", "BUFFER_CLEAR"),
    *("SET_TENSOR", "SET_TENSOR_HASH", "GET_TENSOR", "COPY_TENSOR", "GRAPH_COMPUTE", "GET_DEVICE_MEMORY"),
    *("INIT_TENSOR", "GET_ALLOC_SIZE", "HELLO", "DEVICE_COUNT", "GRAPH_RECOMPUTE", "MEMSET_TENSOR"),
]
NO_ANSWER = {"SET_TENSOR", "GRAPH_COMPUTE", "GRAPH_RECOMPUTE"}
COMMAND_HEADER = struct.Struct("<BQ")


@dataclass
class Counters:
    """What has gone through: RPC commands by name, and bytes to and from the worker."""

    commands: collections.Counter[str] = field(default_factory=collections.Counter)
    sent_bytes: int = 0
    received_bytes: int = 0

    def as_json(self) -> str:
        waits = sum(count for name, count in self.commands.items() if name not in NO_ANSWER)
        document = {
            "waits": waits,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "commands": dict(self.commands),
        }
        return json.dumps(document)


class CommandReader:
    """Counts the commands in the bytes that a head sends."""

    def __init__(self) -> None:
        self._header = b""
        self._payload_left = 0

    def feed(self, data: bytes, commands: collections.Counter[str]) -> None:
        position = 0
        while position < len(data):
            if self._payload_left:
                skipped = min(self._payload_left, len(data) - position)
                self._payload_left -= skipped
                position += skipped
                continue
            missing = COMMAND_HEADER.size - len(self._header)
            self._header += data[position : position + missing]
            position += missing
            if len(self._header) == COMMAND_HEADER.size:
                number, self._payload_left = COMMAND_HEADER.unpack(self._header)
                commands[COMMANDS[number] if number < len(COMMANDS) else str(number)] += 1
                self._header = b""


@dataclass(frozen=True)
class Link:
    """One direction's properties. ``bytes_per_s`` and ``window``: ``None`` for no bound."""

    delay_s: float
    bytes_per_s: float | None
    window: int | None


class Direction:
    """The bytes from one socket to another."""

    def __init__(self, link: Link, source: socket.socket, sink: socket.socket, reader: CommandReader | None) -> None:
        self.source, self.sink = source, sink
        self.is_open = True
        self._link = link
        self._reader = reader
        self._due: collections.deque[tuple[float, bytes]] = collections.deque()
        self._unacknowledged: collections.deque[tuple[float, int]] = collections.deque()
        self._under_way = 0
        self._free_at = 0.0  # when the link has sent what came before

    def may_read(self, now: float) -> bool:
        while self._unacknowledged and self._unacknowledged[0][0] <= now:
            self._under_way -= self._unacknowledged.popleft()[1]
        return self.is_open and (self._link.window is None or self._under_way < self._link.window)

    def read(self, now: float, counters: Counters) -> None:
        window_left = READ_BYTES if self._link.window is None else self._link.window - self._under_way
        try:
            data = self.source.recv(min(READ_BYTES, window_left))
        except ConnectionError:
            data = b""
        if data and self._reader is not None:
            self._reader.feed(data, counters.commands)
            counters.sent_bytes += len(data)
        elif data:
            counters.received_bytes += len(data)
        self.is_open = bool(data)
        sending_s = len(data) / self._link.bytes_per_s if self._link.bytes_per_s else 0.0
        self._free_at = max(now, self._free_at) + sending_s
        arrives_at = self._free_at + self._link.delay_s
        self._due.append((arrives_at, data))  # no data: the end
        if self._link.window is not None:
            self._unacknowledged.append((arrives_at + self._link.delay_s, len(data)))
            self._under_way += len(data)

    def deliver(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            data = self._due.popleft()[1]
            try:
                if data:
                    self.sink.sendall(data)
                else:
                    self.sink.shutdown(socket.SHUT_WR)
            except OSError:
                self.is_open = False

    @property
    def next_event(self) -> float | None:
        times = [queue[0][0] for queue in (self._due, self._unacknowledged) if queue]
        return min(times, default=None)

    @property
    def is_done(self) -> bool:
        return not self.is_open and not self._due


def serve(target_port: int, link: Link) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    directions: list[Direction] = []
    counters = Counters()
    while True:
        now = time.monotonic()
        for direction in directions:
            direction.deliver(now)
        for up, down in zip(directions[::2], directions[1::2], strict=True):
            if up.is_done and down.is_done:
                up.source.close()
                down.source.close()
                directions = [other for other in directions if other not in (up, down)]
        readers = {direction.source.fileno(): direction for direction in directions if direction.may_read(now)}
        events = [at for direction in directions if (at := direction.next_event) is not None]
        timeout = max(0.0, min(events) - time.monotonic()) if events else None
        ready = select.select([listener.fileno(), 0, *readers], [], [], timeout)[0]
        now = time.monotonic()
        for source in ready:
            if source == listener.fileno():
                directions += connect(listener.accept()[0], target_port, link)
            elif source == 0:  # the standard input
                if not sys.stdin.readline():
                    return
                print(counters.as_json(), flush=True)
                counters = Counters()
            else:
                readers[source].read(now, counters)


def connect(head: socket.socket, target_port: int, link: Link) -> list[Direction]:
    worker = socket.create_connection(("127.0.0.1", target_port))
    for side in (head, worker):
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return [Direction(link, head, worker, CommandReader()), Direction(link, worker, head, None)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target_port", type=int)
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--mbit", type=float)
    parser.add_argument("--window-kib", type=int)
    arguments = parser.parse_args()
    rate = None if arguments.mbit is None else arguments.mbit * 1e6 / 8
    window = None if arguments.window_kib is None else arguments.window_kib << 10
    serve(arguments.target_port, Link(arguments.rtt_ms / 2000, rate, window))
