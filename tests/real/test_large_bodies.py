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
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import pytest_asyncio

from tests.cli.meshes import isolated_command
from tests.http_clients import loopback_client
from tests.real.command import write_config

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

SINK, LISTENER = Path(__file__).with_name("sink.py"), Path(__file__).with_name("listener.py")
MODEL = "qwen2.5:7b"
MIB = 1 << 20
STALL_S = 0.4  # of CPU, generous: some ms are usual; it was seconds


def around(inner: bytes, size: int, *, before: bytes = b'"messages":[', after: bytes = b"0]") -> bytes:
    head = b'{"model":"%s",' % MODEL.encode() + before
    return head + inner * ((size - len(head)) // len(inner)) + after + b"}"


@cache
def empties() -> bytes:
    """Made at the first use: each process that only collects this module would hold its 128 MiB."""
    return empty_lists(128 * MIB)


def empty_lists(size: int) -> bytes:
    return around(b"[[],[]],", size)


BODIES: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: empty_lists(64 * MIB),
    "an image": lambda: around(
        base64.b64encode(os.urandom(3 * MIB)), 64 * MIB, before=b'"messages":[{"images":["', after=b'"]}]'
    ),
    "messages": lambda: around(b'{"role":"user","content":"hi"},', 48 * MIB),
    "keys": lambda: around(
        b",".join(b'"%d":[1]' % number for number in range(99_999)) + b",", 32 * MIB, before=b'"x":{', after=b'"":1}'
    ),
    "escapes": lambda: around(b"\\u0041\\ud800", 48 * MIB, before=b'"prompt":"', after=b'"'),
    "no UTF-8": lambda: around(b"\xff\xfe\x80 ", 48 * MIB, before=b'"prompt":"', after=b'"'),
    "digits": lambda: around(b"1234567", 32 * MIB, before=b'"x":', after=b""),
    "depth": lambda: around(b"[" * 9000 + b"]" * 9000 + b",", 32 * MIB),
    "objects in objects": lambda: around(b'{"a":' * 9000 + b"1" + b"}" * 9000 + b",", 32 * MIB),
}


@dataclass(frozen=True)
class GatewayProcess:
    """``rss_at_start``: the bytes that it takes before the first test."""

    port: int
    pid: int
    rss_at_start: int


@dataclass
class Up:
    port: int
    pid: int
    rss_at_start: int
    listener: asyncio.subprocess.Process

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes: by how much its memory was more, at most, than before the first test, since ``forget_peak``."""
        return _memory(self.pid, "VmHWM") - self.rss_at_start

    async def send(self, body: bytes, *more: str) -> int:
        """From a thread, so that it takes no time of this loop. Its status."""
        return await asyncio.to_thread(_send, self.port, body, more)

    async def stalled_s(self) -> float:
        """For how long the gateway worked at most without passing on a token; the stream went on until now."""
        assert self.listener.stdout is not None
        assert self.listener.returncode is None
        self.listener.kill()
        maxima = (await self.listener.stdout.read()).split()
        assert b"ended" not in maxima
        return max(map(float, maxima), default=0.0)


def _memory(pid: int, name: str) -> int:
    """Bytes: ``VmRSS`` now, or ``VmHWM`` at the peak."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) << 10


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway_process(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GatewayProcess]:
    """One for all tests of the module. What an earlier body has left in its memory counts against the later ones."""
    with isolated_command(tmp_path_factory.mktemp("mesh")) as command:
        sink = await asyncio.create_subprocess_exec(sys.executable, str(SINK), MODEL, stdout=asyncio.subprocess.PIPE)
        try:
            assert sink.stdout is not None
            url = f"http://127.0.0.1:{int(await sink.stdout.readline())}"
            write_config(command.config, [{"name": "a", "backend": {"url": url, "max_parallel": 64}}], model=MODEL)
            await command("up", "-d")
            gateway = (await command("status", "--json")).json()["gateway"]["url"]
            async with loopback_client(base_url=gateway, timeout=60) as client:
                # From its first request on it is as it will be.
                assert (await client.post("/api/chat", json={"model": MODEL})).status_code == 200
            pid = command.leader()
            yield GatewayProcess(int(gateway.rpartition(":")[2]), pid, _memory(pid, "VmRSS"))
            await command("down")
        finally:
            sink.kill()
            await sink.wait()


@pytest_asyncio.fixture(loop_scope="module")
async def up(gateway_process: GatewayProcess) -> AsyncIterator[Up]:
    """The gateway, with an honest stream beside."""
    port, pid = gateway_process.port, gateway_process.pid
    arguments = (str(LISTENER), str(port), str(pid), MODEL)
    listener = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert listener.stdout is not None
        await asyncio.wait_for(listener.stdout.readline(), 20)
        yield Up(port, pid, gateway_process.rss_at_start, listener)
    finally:
        if listener.returncode is None:
            with suppress(ProcessLookupError):
                listener.kill()
        await listener.wait()


async def test_a_small_packed_body_never_becomes_gigabytes(up: Up) -> None:
    packed = gzip.compress(empties())
    assert len(packed) < 300_000
    up.forget_peak()
    assert await up.send(packed, "Content-Encoding: gzip") == 413
    assert up.peak() < 64 * MIB
    assert await up.stalled_s() < STALL_S


@pytest.mark.parametrize("made", BODIES.values(), ids=BODIES.keys())
async def test_a_large_body_costs_its_size_and_stops_nobody(up: Up, made: Callable[[], bytes]) -> None:
    body = made()
    up.forget_peak()
    assert await up.send(body) == 200
    assert await up.stalled_s() < STALL_S
    assert up.peak() < len(body) * 1.3 + 48 * MIB


async def test_many_bodies_at_once_cost_what_is_allowed_and_no_more(up: Up) -> None:
    body = around(b'"Why is the sky blue?",', 60 * MIB)
    up.forget_peak()
    statuses = await asyncio.gather(*(up.send(body) for _ in range(14)))
    assert set(statuses) <= {200, 503}
    assert 200 in statuses
    assert up.peak() < 620 * MIB
    assert await up.send(body) == 200, "there is room again"
    assert await up.stalled_s() < STALL_S
