"""Several gateways as processes of their own over one real Redis, and clients that send them requests at a rate."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.coordination.slot_server import MODEL, SlotServer
from tests.real.command import Gpumesh

REQUEST_S = 30.0  # a request that takes longer has failed


@dataclass
class Reply:
    """``status`` is 0 if the connection ended. ``queue_ms``: how long the request waited in its gateway, as the gateway
    says. Times are seconds of ``time.perf_counter``."""

    gateway: int
    prompt: str
    sent_at: float
    ended_at: float
    status: int
    queue_ms: float = 0.0
    body: str = ""

    @property
    def took_ms(self) -> float:
        return (self.ended_at - self.sent_at) * 1000


@dataclass
class GatewayProcess:
    """One gateway, and the idle connections to it. ``pid`` is its process's."""

    number: int
    port: int
    pid: int
    command: Gpumesh
    _idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=deque)

    async def ask(self, prompt: str, *, answer_ms: int, priority: str = "normal", client: str = "") -> Reply:
        """Sends one request and waits for its answer. Raises nothing: a failure is a Reply too."""
        options = {"num_predict": answer_ms}
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps({"model": MODEL, "stream": False, "messages": messages, "options": options}).encode()
        head = (
            f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            f"X-GPUMesh-Priority: {priority}\r\nX-GPUMesh-Client: {client}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reply = Reply(self.number, prompt, time.perf_counter(), 0.0, 0)
        try:
            async with asyncio.timeout(REQUEST_S):
                await self._exchange(head.encode() + body, reply)
        except (OSError, EOFError, TimeoutError) as error:
            reply.body = repr(error)
        reply.ended_at = time.perf_counter()
        return reply

    async def _exchange(self, message: bytes, reply: Reply) -> None:
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(message)
            answer_head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if "\r\ncontent-length:" in answer_head:
                answer = await reader.readexactly(int(_header(answer_head, "content-length")))
            else:
                answer = await reader.readuntil(b"0\r\n\r\n")
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        reply.status = int(answer_head.split(" ", 2)[1])
        reply.queue_ms = float(_header(answer_head, "x-gpumesh-queue-ms") or 0)
        if reply.status != 200:
            reply.body = answer.decode(errors="replace")

    async def get(self, path: str) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
        return json.loads(answer.partition(b"\r\n\r\n")[2])

    async def findings(self) -> set[str]:
        """The codes of what the gateway finds wrong now."""
        status = await self.get("/mesh/status")
        return {finding["code"] for finding in status["findings"]}

    def kill(self) -> None:
        self.close()
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop()[1].close()


def _header(head: str, name: str) -> str:
    return head.partition(f"\r\n{name}:")[2].split("\r", 1)[0].strip()


@contextlib.asynccontextmanager
async def gateway_processes(
    count: int, servers: Sequence[SlotServer], folder: Path, redis_url: str | None, *, max_parallel: bool = True
) -> AsyncIterator[list[GatewayProcess]]:
    """Starts ``count`` gateways over these servers, each with folders of its own, and waits until all nodes are up.
    ``max_parallel``: mesh.yaml names the slots of each server."""
    runtimes = [Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp")) for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        gateways: list[GatewayProcess] = []
        for number, runtime in enumerate(runtimes):
            stack.callback(shutil.rmtree, runtime, ignore_errors=True)
            home = folder / f"home-{number}"
            home.mkdir()
            port = _free_port()
            command = Gpumesh(folder / f"mesh-{number}.yaml", home, runtime, warm=True)
            nodes = [
                {
                    "name": f"node-{index}",
                    "backend": {"url": server.url, **({"max_parallel": server.slots} if max_parallel else {})},
                }
                for index, server in enumerate(servers)
            ]
            gateway = {"listen": f"127.0.0.1:{port}", "max_queue": 10_000}
            document: dict[str, Any] = {"version": 1, "name": "fleet", "gateway": gateway, "nodes": nodes}
            if redis_url is not None:
                document["redis"] = {"url": redis_url}
            command.config.write_text(json.dumps(document))
            process = await stack.enter_async_context(command.started("up", "--quiet"))
            stack.callback(command.kill_all)
            gateways.append(GatewayProcess(number, port, process.pid, command))
            stack.callback(gateways[-1].close)
        for gateway_process in gateways:
            await _wait_up(gateway_process, len(servers))
        yield gateways


async def _wait_up(gateway: GatewayProcess, nodes: int) -> None:
    async with asyncio.timeout(REQUEST_S):
        while True:
            with contextlib.suppress(OSError, ValueError):  # it does not listen yet
                status = await gateway.get("/mesh/status")
                if status["totals"]["nodes_up"] == nodes:
                    return
            await asyncio.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class SteadyLoad:
    """Requests at a rate, to the gateways in turn, whether or not earlier ones are answered."""

    gateways: Sequence[GatewayProcess]
    rate: float
    answer_ms: int
    priority: str = "normal"
    replies: list[Reply] = field(default_factory=list)
    sent: int = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SteadyLoad]:
        """Sends while the block runs, and then waits for the answers."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(stop, tasks))
            try:
                yield self
            finally:
                stop.set()

    async def _send(self, stop: asyncio.Event, tasks: asyncio.TaskGroup) -> None:
        due = time.perf_counter()
        while not stop.is_set():
            gateway = self.gateways[self.sent % len(self.gateways)]
            tasks.create_task(self._ask(gateway, f"{self.priority}-{self.sent}"))
            self.sent += 1
            due += 1 / self.rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))

    async def _ask(self, gateway: GatewayProcess, prompt: str) -> None:
        self.replies.append(await gateway.ask(prompt, answer_ms=self.answer_ms, priority=self.priority))

    def failures(self, *, ignored: Iterable[int] = ()) -> list[str]:
        """What failed, without the requests to the gateways ``ignored``."""
        ignored = set(ignored)
        failed = [reply for reply in self.replies if reply.status != 200 and reply.gateway not in ignored]
        counted = Counter(f"gateway {reply.gateway}: {reply.status} {reply.body[:200]}" for reply in failed)
        return [f"{count} x {text}" for text, count in counted.items()]


def percentile(values: Iterable[float], share: float) -> float:
    """The percentile by nearest rank; NaN for no values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


async def wait_for(condition: Callable[[], Any], *, limit_s: float) -> float | None:
    """Asks until the coroutine of ``condition`` returns a true value. Returns the seconds that this took; ``None``
    after ``limit_s``."""
    began = time.perf_counter()
    while time.perf_counter() - began < limit_s:
        if await condition():
            return time.perf_counter() - began
        await asyncio.sleep(0.05)
    return None
