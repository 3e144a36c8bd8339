"""The routes that the tunnel benchmarks compare, over one real sshd on loopback, and the small HTTP server behind them.

``GET /api/version`` is answered at once; with ``?apart=US`` the body comes US microseconds after the head. ``GET
/stream?tokens=N&rate=R`` is answered with N lines, R per second. Each line has the time (monotonic, ns) at which it
should be sent; the client counts its delay from then. Run as a program, this file is that server and prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpumesh.topology import Target, TransportKind  # noqa: E402
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest  # noqa: E402
from gpumesh.tunnels.workers.worker_pool import WorkerPool  # noqa: E402
from tests.tunnels.sshd import Sshd, listener  # noqa: E402

STOCK_SSHTUNNEL = """
import sys, sshtunnel
host, port, user, key, target = sys.argv[1:]
forwarder = sshtunnel.SSHTunnelForwarder(
    (host, int(port)), ssh_username=user, ssh_pkey=key, allow_agent=False, host_pkey_directories=[],
    ssh_config_file=None, remote_bind_address=("127.0.0.1", int(target)), local_bind_address=("127.0.0.1", 0))
forwarder.start()
print(forwarder.local_bind_port, flush=True)
sys.stdin.read()
forwarder.stop(force=True)
"""


class StandInServer(asyncio.Protocol):
    """A minimal HTTP/1.1 server with keep-alive. Each token is a ``write`` of its own, as in an inference server."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._buffer = b""
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if self._streaming is not None:
            self._streaming.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head_of_request, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
            stream = re.match(rb"GET /stream\?tokens=(\d+)&rate=(\d+)", head_of_request)
            if stream:
                self._streaming = asyncio.create_task(self._stream(int(stream[1]), int(stream[2])))
            else:
                body = b'{"version":"0.12.6"}'
                # Head and body are two writes, as in uvicorn: two SSH packets. Nagle's algorithm delays the second.
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                self._transport.write(head % len(body))
                apart = re.search(rb"\?apart=(\d+)", head_of_request)
                if apart:
                    # The loop's timer counts in milliseconds, and no other client is served meanwhile.
                    time.sleep(int(apart[1]) / 1e6)
                self._transport.write(body)

    async def _stream(self, tokens: int, rate: int) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        started_at = time.monotonic()
        for number in range(1, tokens + 1):
            due_at = started_at + number / rate
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            line = b"%020d\n" % int(due_at * 1e9)
            self._transport.write(b"%x\r\n%s\r\n" % (len(line), line))
        self._transport.write(b"0\r\n\r\n")


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(StandInServer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.freeze()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextlib.asynccontextmanager
async def child_server(*argv: str, prints_port: bool = True) -> AsyncIterator[int]:
    """The port that a child process prints. The process lives until its stdin is closed."""
    process = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await asyncio.wait_for(process.stdout.readline(), 30)) if prints_port else 0
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def gpumesh_route(
    sshd: Sshd, pool: WorkerPool, target: int, transport: TransportKind, *, share: bool = False
) -> AsyncIterator[int]:
    control = sshd.folder / f"control-{transport}{'-shared' if share else ''}"
    control.mkdir(mode=0o700, exist_ok=True)
    ssh = sshd.spec(transport=transport)
    setup = ConnectRequest("bench", ssh, (Target("127.0.0.1", target),), control_dir=str(control), share=share)
    with listener() as local:
        async with await pool.spawn(setup, [local]) as worker:
            message = await worker.receive()
            if not isinstance(message, ConnectionInfo):
                raise SystemExit(f"{transport}: {message}")
            yield local.getsockname()[1]


@contextlib.asynccontextmanager
async def stock_ssh(sshd: Sshd, target: int) -> AsyncIterator[int]:
    with listener() as probe:
        port = probe.getsockname()[1]
    ssh = shutil.which("ssh") or "ssh"
    process = await asyncio.create_subprocess_exec(
        *(ssh, "-F", "none", "-N", "-L", f"127.0.0.1:{port}:127.0.0.1:{target}", "-p", str(sshd.port)),
        *("-i", str(sshd.identity), "-o", f"UserKnownHostsFile={sshd.known_hosts}", "-o", "IdentitiesOnly=yes"),
        *("-o", "ExitOnForwardFailure=yes", "127.0.0.1"),
        stdin=subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(15):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield port
    finally:
        process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def stock_sshtunnel(sshd: Sshd, target: int) -> AsyncIterator[int]:
    spec = sshd.spec()
    argv = (spec.host, str(spec.port), spec.user, str(sshd.identity), str(target))
    async with child_server(sys.executable, "-c", STOCK_SSHTUNNEL, *argv) as port:
        yield port


@contextlib.asynccontextmanager
async def benchmark_setup(folder: Path) -> AsyncIterator[tuple[Sshd, WorkerPool, int]]:
    """An sshd, a pool, and the port of a stand-in server in a process of its own."""
    async with (
        Sshd(folder / "sshd", {"LogLevel": "ERROR"}) as sshd,
        WorkerPool(stderr=None) as pool,
        child_server(sys.executable, __file__) as target,
    ):
        yield sshd, pool, target


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; ``share`` of 0.5 is the median."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    asyncio.run(serve())
