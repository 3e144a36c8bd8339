"""Watches honest streams through a gateway, and tells a stall of the gateway from a stall of the machine.

    python benchmarks/stream_watch.py GATEWAY_PORT DIRECT_PORT GATEWAY_PID [--streams 3] [--rate 50]

Each token of `fast_ollama.py` holds the time at which it was sent, so its delay is known here. Three causes outside the
gateway are measured, too: another stream goes to a node directly, a bare timer runs in this process, and the kernel
tells how long the gateway was ready to run and had no core (/proc/PID/schedstat). The delay without these is the part
that the gateway itself caused: ``own_ms``. The output is one JSON line for each stall above 50 ms, and one for each
second, until standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lean_client import Connection, request, stream_body

BEAT_S = 0.01
STALL_MS = 50.0
STAMP = b'"content":"'  # the time at which a token was sent follows
STREAM_TOKENS = 500


@dataclass(frozen=True, slots=True)
class Beat:
    """A tick of the timer: how late it came. ``ran_ms`` and ``waited_ms``: how long the gateway has run on a core, and
    waited for one, since its start."""

    at: float
    late_ms: float
    ran_ms: float
    waited_ms: float


@dataclass
class Second:
    """The figures that are printed each second: the largest delays in it. ``lost``: streams that were cut or
    refused."""

    tokens: int = 0
    lost: int = 0
    delay_ms: float = 0.0
    own_ms: float = 0.0
    gap_ms: float = 0.0
    direct_ms: float = 0.0
    direct_gap_ms: float = 0.0
    late_ms: float = 0.0


@dataclass
class Watch:
    pid: int
    beats: deque[Beat] = field(default_factory=lambda: deque(maxlen=3000))
    direct: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=1000))
    second: Second = field(default_factory=Second)
    reported_until: float = 0.0

    def beat(self, due: float) -> None:
        now = time.monotonic()
        ran, waited, _ = Path(f"/proc/{self.pid}/schedstat").read_text().split()
        late = max((now - due) * 1000.0, 0.0)
        self.beats.append(Beat(now, late, int(ran) / 1e6, int(waited) / 1e6))
        self.second.late_ms = max(self.second.late_ms, late)

    def own_ms(self, now: float, delay_ms: float) -> tuple[float, dict[str, float]]:
        """The part of a delay (ending now) that the gateway caused, and figures about the other causes."""
        beats = list(self.beats)
        start = now - delay_ms / 1000.0
        first = max(bisect_right(beats, start, key=lambda beat: beat.at) - 1, 0)
        beats_inside = beats[first:]
        waited_ms = beats_inside[-1].waited_ms - beats_inside[0].waited_ms
        ran_ms = beats_inside[-1].ran_ms - beats_inside[0].ran_ms
        late_ms = max(beat.late_ms for beat in beats_inside)
        direct_ms = max((delay for at, delay in self.direct if at >= start), default=0.0)
        control_ms = max(late_ms, direct_ms)
        causes = {"waited_ms": waited_ms, "ran_ms": ran_ms, "control_ms": control_ms}
        return max(delay_ms - waited_ms - control_ms, 0.0), causes

    def add_token(self, now: float, sent: float, gap_ms: float, *, direct: bool) -> None:
        second, delay_ms = self.second, (now - sent) * 1000.0
        if direct:
            self.direct.append((now, delay_ms))
            second.direct_ms = max(second.direct_ms, delay_ms)
            second.direct_gap_ms = max(second.direct_gap_ms, gap_ms)
            return
        second.tokens += 1
        second.delay_ms = max(second.delay_ms, delay_ms)
        second.gap_ms = max(second.gap_ms, gap_ms)
        # All tokens that waited in one stall come at its end. Those sent before it was reported are part of it.
        if delay_ms > STALL_MS and sent >= self.reported_until:
            self.reported_until = now
            # Later, because only the next beat covers the time until now.
            asyncio.get_running_loop().call_later(2 * BEAT_S, self._report_stall, now, delay_ms)

    def _report_stall(self, now: float, delay_ms: float) -> None:
        own, causes = self.own_ms(now, delay_ms)
        self.second.own_ms = max(self.second.own_ms, own)
        print_line({"stall": {"at": now, "delay_ms": delay_ms, "own_ms": own, **causes}})


def print_line(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


async def run_timer(watch: Watch) -> None:
    due = time.monotonic() + BEAT_S
    while True:
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        watch.beat(due)
        due = max(due + BEAT_S, time.monotonic())


async def run_streams(watch: Watch, port: int, rate: float, *, direct: bool) -> None:
    """Runs one stream after another, for ever. A stream that is cut or refused counts as lost."""
    loop = asyncio.get_running_loop()
    message = request(f"127.0.0.1:{port}", stream_body(STREAM_TOKENS, rate))
    while True:
        ended: asyncio.Future[int] = loop.create_future()
        last: float | None = None
        tokens = 0

        def on_data(data: bytes) -> None:
            nonlocal last, tokens
            now = time.monotonic()
            at = data.find(STAMP)
            while at >= 0:
                at += len(STAMP)
                stop = data.find(b" ", at, at + 24)
                if stop > at:
                    tokens += 1
                    watch.add_token(
                        now, int(data[at:stop]) / 1e9, 0.0 if last is None else (now - last) * 1000, direct=direct
                    )
                    last = now
                at = data.find(STAMP, at)

        def on_answer(status: int, ended: asyncio.Future[int] = ended) -> None:
            if not ended.done():
                ended.set_result(status)

        try:
            transport, _ = await loop.create_connection(lambda: Connection(on_answer, on_data), "127.0.0.1", port)
        except OSError:
            watch.second.lost += 1
            await asyncio.sleep(0.2)
            continue
        transport.write(message)
        status = await ended
        transport.close()
        if status != 200 or tokens < STREAM_TOKENS * 0.95:
            watch.second.lost += 1
            print_line({"lost": {"status": status, "tokens": tokens, "direct": direct}})
            await asyncio.sleep(0.2)


async def watch_all(given: argparse.Namespace) -> None:
    watch = Watch(given.pid)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(run_timer(watch)),
            group.create_task(run_streams(watch, given.direct, given.rate, direct=True)),
        ]
        for _ in range(given.streams):
            tasks.append(group.create_task(run_streams(watch, given.gateway, given.rate, direct=False)))
        input_end = group.create_task(reader.read())
        while not input_end.done():
            await asyncio.wait({input_end}, timeout=1.0)
            print_line({"second": {name: getattr(watch.second, name) for name in Second.__dataclass_fields__}})
            watch.second = Second()
        for task in tasks:
            task.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gateway", type=int)
    parser.add_argument("direct", type=int)
    parser.add_argument("pid", type=int)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--rate", type=float, default=50.0)
    asyncio.run(watch_all(parser.parse_args()))


if __name__ == "__main__":
    main()
