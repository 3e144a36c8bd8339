"""A pool on this machine for benchmarks/pool_speed.py: ggml-rpc-servers behind links with a distance, and a
llama-server with layers of its own. Each program computes with one thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.prerequisites import llama_server

RELAY = Path(__file__).with_name("delaying_relay.py")
START_S = 300.0


def find_programs() -> tuple[Path, Path]:
    """llama-server and ggml-rpc-server. Raises SystemExit if they are not installed."""
    server = llama_server()
    if server is None:
        raise SystemExit("no llama-server: run `make .venv/.llama-server`")
    return server, server.with_name("ggml-rpc-server")


def pick_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Distance:
    """The way from the head to a worker."""

    rtt_ms: float = 0.0
    mbit: float | None = None
    window_kib: int | None = None

    @property
    def options(self) -> list[str]:
        options = ["--rtt-ms", str(self.rtt_ms)]
        if self.mbit is not None:
            options += ["--mbit", str(self.mbit)]
        if self.window_kib is not None:
            options += ["--window-kib", str(self.window_kib)]
        return options


@dataclass(frozen=True)
class Traffic:
    """What a relay has counted (delaying_relay.Counters)."""

    waits: int
    sent_bytes: int
    received_bytes: int
    commands: dict[str, int]


class Relay:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    async def take_traffic(self) -> Traffic:
        """What has gone through since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        return Traffic(**json.loads(await self._process.stdout.readline()))


@dataclass(frozen=True)
class Answer:
    """One stream's answer: when its first and last token came (seconds), and what llama-server says of it."""

    first_at: float
    last_at: float
    tokens: int
    timings: dict[str, Any]


class Head:
    """A llama-server that answers."""

    def __init__(self, port: int, relays: Sequence[Relay], ready_s: float, session: aiohttp.ClientSession) -> None:
        self.relays = relays
        self.ready_s = ready_s
        self._url = f"http://127.0.0.1:{port}"
        self._session = session

    async def generate(self, tokens: int, *, prompt: str = "Once upon a time", seed: int = 1) -> Answer:
        """Streams one answer, greedily."""
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "seed": seed,
            "cache_prompt": False,
            "ignore_eos": True,
            "stream": True,
        }
        started_at = time.monotonic()
        first_at = last_at = started_at
        timings: dict[str, Any] = {}
        async with self._session.post(f"{self._url}/completion", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                now = time.monotonic()
                first_at = now if first_at == started_at else first_at
                timings = event.get("timings", timings)
                last_at = now if event.get("content") else last_at
        return Answer(first_at, last_at, int(timings["predicted_n"]), timings)

    async def generate_together(self, streams: int, tokens: int) -> list[Answer]:
        prompts = [f"Story {number} begins here" for number in range(streams)]
        return list(await asyncio.gather(*(self.generate(tokens, prompt=prompt) for prompt in prompts)))

    async def metrics(self) -> dict[str, float]:
        async with self._session.get(f"{self._url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}


def rate_of(answers: Sequence[Answer]) -> float:
    """Tokens per second of all streams together, as their clients see it: without the first token of each."""
    first_at = min(answer.first_at for answer in answers)
    last_at = max(answer.last_at for answer in answers)
    return sum(answer.tokens - 1 for answer in answers) / (last_at - first_at)


async def _start(stack: contextlib.AsyncExitStack, *argv: str, **options: Any) -> asyncio.subprocess.Process:
    """Starts a program, which the stack ends."""
    process = await asyncio.create_subprocess_exec(*argv, **options)

    async def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    return process


async def _start_worker(stack: contextlib.AsyncExitStack, log: Path, cache: Path | None) -> int:
    port = pick_port()
    options = ["-H", "127.0.0.1", "-p", str(port), "-t", "1", "-d", "CPU"]
    environment = dict(os.environ)
    if cache is not None:
        options.append("-c")
        environment["LLAMA_CACHE"] = str(cache)
    with log.open("ab") as output:
        await _start(stack, str(find_programs()[1]), *options, stdout=output, stderr=output, env=environment)
    await _until_port_accepts(port)
    return port


async def _until_port_accepts(port: int) -> None:
    async with asyncio.timeout(START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return


async def _start_relay(stack: contextlib.AsyncExitStack, target: int, distance: Distance) -> Relay:
    pipe = asyncio.subprocess.PIPE
    argv = [sys.executable, str(RELAY), str(target), *distance.options]
    process = await _start(stack, *argv, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    return Relay(process, int(await process.stdout.readline()))


async def measure_echo(distance: Distance, *, count: int = 20) -> float:
    """The round trip through such a link in ms, with an echo at its end: the median."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(64):
            writer.write(data)
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(echo, "127.0.0.1", 0))
        relay = await _start_relay(stack, server.sockets[0].getsockname()[1], distance)
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        times_ms = []
        for _ in range(count):
            started_at = time.perf_counter()
            writer.write(b"x")
            await reader.readexactly(1)
            times_ms.append((time.perf_counter() - started_at) * 1000)
        writer.close()
    return statistics.median(times_ms)


@contextlib.asynccontextmanager
async def running_pool(
    folder: Path,
    model: Path,
    distances: Sequence[Distance],
    *,
    worker_layers: int = 0,
    streams: int = 1,
    context: int = 1024,
    options: Sequence[str] = (),
    cache: Path | None = None,
) -> AsyncIterator[Head]:
    """A head with a worker behind each distance. The workers have the last ``worker_layers`` layers (the output counts
    as one), in equal parts; the head has the others. ``cache``: the folder of the workers' caches."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [await _start_worker(stack, folder / f"worker{n}.log", cache) for n in range(len(distances))]
        pairs = zip(workers, distances, strict=True)
        relays = [await _start_relay(stack, port, distance) for port, distance in pairs]
        port = pick_port()
        argv = [str(find_programs()[0]), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        argv += ["-c", str(context * streams), "-np", str(streams), "-t", "1", "-tb", "1"]
        argv += ["--no-warmup", "--no-ui", "--metrics", "-fit", "off", "-lv", "4"]
        # A worker's weights are in allocated memory, which is read more slowly than a mapped file. So the head's too.
        argv += ["--cache-ram", "0", "--kv-unified", "-lm", "none", *options]
        if relays:
            endpoints = ",".join(f"127.0.0.1:{relay.port}" for relay in relays)
            argv += ["--rpc", endpoints, "-ngl", str(worker_layers), "-sm", "layer"]
            argv += ["-ts", ",".join(["1"] * len(relays))]
        started_at = time.monotonic()
        with (folder / "head.log").open("ab") as output:
            head = await _start(stack, *argv, stdout=output, stderr=output)
        connector = aiohttp.TCPConnector(force_close=True)  # llama-server ends connections that are kept
        timeout = aiohttp.ClientTimeout(total=None)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        await _until_healthy(session, port, head)
        yield Head(port, relays, time.monotonic() - started_at, session)


async def _until_healthy(session: aiohttp.ClientSession, port: int, head: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(START_S):
        while head.returncode is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/health") as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.02)
    raise SystemExit(f"llama-server ended with {head.returncode}; see head.log")
