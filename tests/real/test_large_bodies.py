"""A gateway that runs as a process of its own, and bodies that cost gigabytes and seconds: its peak of memory, and the
longest time for which an honest stream beside stood still."""

from __future__ import annotations

import asyncio
import base64
import gzip
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.real.command import Gpumesh, write_config

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]

SINK = Path(__file__).with_name("sink.py")
MODEL = "qwen2.5:7b"
MIB = 1 << 20
STALL_S = 0.6  # generous: 5 ms are usual on a machine of its own; it was seconds


def around(inner: bytes, size: int, *, before: bytes = b'"messages":[', after: bytes = b"0]") -> bytes:
    head = b'{"model":"%s",' % MODEL.encode() + before
    return head + inner * ((size - len(head)) // len(inner)) + after + b"}"


EMPTIES = around(b"[[],[]],", 128 * MIB)
BODIES: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: EMPTIES,
    "an image": lambda: around(
        base64.b64encode(os.urandom(3 * MIB)), 128 * MIB, before=b'"messages":[{"images":["', after=b'"]}]'
    ),
    "messages": lambda: around(b'{"role":"user","content":"hi"},', 100 * MIB),
    "keys": lambda: around(
        b",".join(b'"%d":[1]' % number for number in range(99_999)) + b",", 64 * MIB, before=b'"x":{', after=b'"":1}'
    ),
    "escapes": lambda: around(b"\\u0041\\ud800", 100 * MIB, before=b'"prompt":"', after=b'"'),
    "no UTF-8": lambda: around(b"\xff\xfe\x80 ", 100 * MIB, before=b'"prompt":"', after=b'"'),
    "digits": lambda: around(b"1234567", 64 * MIB, before=b'"x":', after=b""),
    "depth": lambda: around(b"[" * 9000 + b"]" * 9000 + b",", 64 * MIB),
    "objects in objects": lambda: around(b'{"a":' * 9000 + b"1" + b"}" * 9000 + b",", 64 * MIB),
}


@dataclass
class Up:
    port: int
    pid: int
    client: httpx.AsyncClient
    longest_s: float = 0.0
    tokens: int = 0

    def memory(self, name: str) -> int:
        """Bytes: ``VmRSS`` now, ``VmHWM`` at its peak since ``forget_peak``."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    def forget_peak(self) -> int:
        """What it takes now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.memory("VmRSS")

    async def send(self, body: bytes, *more: str) -> int:
        """From a thread, so that it takes no time of this loop. Its status."""
        return await asyncio.to_thread(_send, self.port, body, more)

    async def listen(self, begun: asyncio.Event) -> None:
        """One honest stream, for as long as this task lives."""
        chat = {"model": MODEL, "stream": True, "messages": []}
        async with self.client.stream("POST", "/api/chat", json=chat) as answer:
            last = None
            async for _ in answer.aiter_raw():
                now = time.monotonic()
                if last is not None:
                    self.longest_s = max(self.longest_s, now - last)
                last = now
                self.tokens += 1
                begun.set()


def _send(port: int, body: bytes, more: tuple[str, ...]) -> int:
    head = ["POST /api/chat HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more, "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        try:
            connection.sendall("\r\n".join(head).encode())
            connection.sendall(body)
        except ConnectionError:
            pass  # it was refused before it was read
        answer = connection.recv(1 << 16)
    return int(answer.split()[1])


@pytest.fixture
async def up(alone: Gpumesh) -> AsyncIterator[Up]:
    sink = await asyncio.create_subprocess_exec(sys.executable, str(SINK), MODEL, stdout=asyncio.subprocess.PIPE)
    try:
        assert sink.stdout is not None
        url = f"http://127.0.0.1:{int(await sink.stdout.readline())}"
        write_config(alone.config, [{"name": "a", "backend": {"url": url, "max_parallel": 64}}], model=MODEL)
        await alone("up", "-d")
        gateway = (await alone("status", "--json")).json()["gateway"]["url"]
        async with httpx.AsyncClient(base_url=gateway, trust_env=False, timeout=60) as client:
            # From its first request on it is as it will be.
            assert (await client.post("/api/chat", json={"model": MODEL})).status_code == 200
            made = Up(int(gateway.rpartition(":")[2]), alone.leader(), client)
            begun = asyncio.Event()
            stream = asyncio.create_task(made.listen(begun))
            await asyncio.wait_for(begun.wait(), 20)
            yield made
            assert not stream.done(), "the honest stream went on to the end"
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)
        await alone("down")
    finally:
        sink.kill()
        await sink.wait()


async def test_a_small_packed_body_never_becomes_gigabytes(up: Up) -> None:
    packed = gzip.compress(EMPTIES)
    assert len(packed) < 300_000
    before = up.forget_peak()
    assert await up.send(packed, "Content-Encoding: gzip") == 413
    assert up.memory("VmHWM") - before < 64 * MIB
    assert up.longest_s < STALL_S


@pytest.mark.parametrize("made", BODIES.values(), ids=BODIES.keys())
async def test_a_large_body_costs_its_size_and_stops_nobody(up: Up, made: Callable[[], bytes]) -> None:
    body = made()
    before = up.forget_peak()
    up.longest_s = 0.0
    assert await up.send(body) == 200
    assert up.longest_s < STALL_S
    assert up.memory("VmHWM") - before < len(body) * 1.3 + 48 * MIB


async def test_many_bodies_at_once_cost_what_is_allowed_and_no_more(up: Up) -> None:
    body = around(b'"Why is the sky blue?",', 60 * MIB)
    before = up.forget_peak()
    up.longest_s = 0.0
    statuses = await asyncio.gather(*(up.send(body) for _ in range(14)))
    assert set(statuses) <= {200, 503}
    assert 200 in statuses
    assert up.memory("VmHWM") - before < 620 * MIB
    assert up.longest_s < STALL_S
    assert await up.send(body) == 200, "there is room again"
