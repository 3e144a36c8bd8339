"""What people and systems end a mesh with, once and again, while clients of each dialect wait. Real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.cli.meshes import MODEL, SimulatedMesh, quick_host, simulated_mesh
from tests.http_clients import loopback_client
from tests.real.command import Gpumesh
from tests.real.warm_commands import WarmProcess
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.slow]

MESSAGES = [{"role": "user", "content": "go on"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "go on"},
    "/v1/chat/completions": {"messages": MESSAGES, "stream": True},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9000, "stream": True},
}
STOPPED = "the gateway was stopped"


@pytest.fixture
async def endless(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    host = quick_host("alpha", ssh=False, tokens_per_s=50.0, answer_tokens=(9000, 9000), slots=6)
    async with simulated_mesh(gpumesh, host) as made:
        made.write([made.node("alpha", backend={"url": made.node("alpha")["backend"]["url"], "max_parallel": 6})])
        yield made


def error_of(path: str, text: str) -> dict[str, Any]:
    """The last frame of a stream, which must be an error in its dialect."""
    last = text.strip().split("\n\n" if path.startswith("/v1") else "\n")[-1]
    if path == "/v1/messages":
        event, _, data = last.partition("\n")
        assert event == "event: error", text[-300:]
        document: dict[str, Any] = json.loads(data.removeprefix("data: "))
        assert document["type"] == "error"
        return document
    document = json.loads(last.removeprefix("data: "))
    assert "error" in document, text[-300:]
    return document


class Clients:
    """One in mid-stream for each dialect, two that wait for a whole answer, and one that waits for a place."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.streams: dict[str, asyncio.Task[str]] = {}
        self.whole: dict[str, asyncio.Task[httpx.Response]] = {}
        self._begun = 0

    async def start(self, stack: AsyncExitStack, gpumesh: Gpumesh) -> None:
        client = await stack.enter_async_context(
            loopback_client(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None))
        )

        async def stream(path: str) -> str:
            text = ""
            async with client.stream("POST", path, json={"model": MODEL, **STREAMS[path]}) as answer:
                assert answer.status_code == 200
                async for piece in answer.aiter_text():
                    self._begun += not text
                    text += piece
            return text

        def ask(path: str, **more: Any) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(
                client.post(path, json={"model": MODEL, **STREAMS[path], "stream": False, **more})
            )

        self.streams = {path: asyncio.create_task(stream(path)) for path in STREAMS}
        await wait_until(lambda: self._begun == len(STREAMS), "all streams have begun")
        self.whole = {"/api/chat": ask("/api/chat"), "/v1/messages": ask("/v1/messages")}
        await load(gpumesh, in_flight=6, queued=0)
        self.whole["/v1/chat/completions"] = ask("/v1/chat/completions")
        await load(gpumesh, in_flight=6, queued=1)

    async def all_were_told(self) -> None:
        for path, task in self.streams.items():
            assert STOPPED in json.dumps(error_of(path, await task)), path
        for path, asked in self.whole.items():
            response = await asked
            assert response.status_code == 503, path
            document = response.json()
            assert STOPPED in json.dumps(document)
            assert isinstance(document["error"], str) == path.startswith("/api")


async def load(gpumesh: Gpumesh, **wanted: int) -> None:
    async with asyncio.timeout(20):
        while True:
            gateway = (await gpumesh("status", "--json")).json()["gateway"]
            if all(gateway[name] == count for name, count in wanted.items()):
                return
            await asyncio.sleep(0.1)


async def draining(url: str) -> None:
    """Returns when the gateway drains: from then on it takes no clients. A look at `gpumesh status` takes seconds on a
    busy machine, and could miss the time of draining."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except ConnectionError:
                return
            writer.close()
            await asyncio.sleep(0.01)


async def url_of(gpumesh: Gpumesh) -> str:
    """The gateway's address, once it and all nodes are up."""
    async with asyncio.timeout(20):
        while True:
            document = (await gpumesh("status", "--json")).json()
            up = all(node["backend"]["state"] == "up" for node in document["nodes"])
            if up and document["gateway"]["state"] == "serving":
                return str(document["gateway"]["url"])
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_second_tells_every_client_why_it_gets_no_more(
    endless: SimulatedMesh, number: signal.Signals
) -> None:
    gpumesh = endless.gpumesh
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(gpumesh.started("up"))
        url = await url_of(gpumesh)
        clients = Clients(url)
        await clients.start(stack, gpumesh)
        process.send_signal(number)
        await draining(url)
        assert not any(task.done() for task in (*clients.streams.values(), *clients.whole.values())), "it waits"
        process.send_signal(number)
        began = time.monotonic()
        await clients.all_were_told()
        async with asyncio.timeout(20):
            assert await process.wait() == 130
        assert time.monotonic() - began < 8.0, "and not for the ten seconds that draining may take"
    await wait_until(lambda: endless.hosts["alpha"].counters.in_flight == 0, "the generations have stopped")
    assert gpumesh.sockets() == []


@pytest.mark.parametrize("way", ["down", "SIGTERM"])
async def test_in_the_background_too(endless: SimulatedMesh, way: str) -> None:
    gpumesh = endless.gpumesh
    await gpumesh("up", "-d")
    (pid,) = gpumesh.processes()
    async with AsyncExitStack() as stack:
        url = await url_of(gpumesh)
        clients = Clients(url)
        await clients.start(stack, gpumesh)
        if way == "down":
            first = await stack.enter_async_context(gpumesh.started("down", "--wait", "500"))
            await draining(url)
            ended = asyncio.create_task(gpumesh("down", "--wait", "0"))
        else:
            os.kill(pid, signal.SIGTERM)
            await draining(url)
            os.kill(pid, signal.SIGTERM)
        await clients.all_were_told()
        if way == "down":
            await ended
            async with asyncio.timeout(20):
                assert await first.wait() == 0
        await wait_until(lambda: not gpumesh.processes(), "it has ended")
    assert gpumesh.sockets() == []


async def test_the_third_ends_it_at_once(endless: SimulatedMesh) -> None:
    gpumesh = endless.gpumesh
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(gpumesh.started("up"))
        url = await url_of(gpumesh)
        clients = Clients(url)
        await clients.start(stack, gpumesh)
        process.send_signal(signal.SIGINT)
        await draining(url)
        # Frozen, so that all that follows is there at the same time.
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            assert await process.wait() in (130, 143)
        await asyncio.gather(*clients.streams.values(), *clients.whole.values(), return_exceptions=True)
    await wait_until(lambda: not gpumesh.processes(), "nothing of it is left")


async def test_a_terminal_that_is_closed_says_so_twice_and_cuts_nothing(gpumesh: Gpumesh) -> None:
    host = quick_host("alpha", ssh=False, tokens_per_s=20.0, answer_tokens=(80, 80))  # for 4 s
    async with simulated_mesh(gpumesh, host), gpumesh.terminal("up") as terminal:
        url = await url_of(gpumesh)
        async with loopback_client(timeout=30) as client:
            body = {"model": MODEL, "messages": MESSAGES}
            async with client.stream("POST", f"{url}/api/chat", json=body) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                terminal.process.send_signal(signal.SIGHUP)
                await draining(url)
                terminal.process.send_signal(signal.SIGHUP)
                assert json.loads([line async for line in lines][-1])["done"]
        assert await terminal.wait_exit() == 0


async def test_a_mesh_without_a_terminal_reads_its_file_again_at_a_hangup(endless: SimulatedMesh) -> None:
    """As systemd runs it: `systemctl reload`. In the background it is the same."""
    endless.write(reload="manual")
    async with endless.gpumesh.started("up") as process:
        await url_of(endless.gpumesh)
        await _change_and_hang_up(endless, process, "first")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    await endless.gpumesh("up", "-d")
    await _change_and_hang_up(endless, endless.gpumesh.leader(), "second")
    await endless.gpumesh("down")


async def _change_and_hang_up(
    made: SimulatedMesh, process: asyncio.subprocess.Process | WarmProcess | int, name: str
) -> None:
    made.write([made.node("alpha", labels={"site": name})], reload="manual")
    if isinstance(process, int):
        os.kill(process, signal.SIGHUP)
    else:
        process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(20):
        while (await made.gpumesh("status", "--json")).json()["nodes"][0]["labels"] != [["site", name]]:
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
async def test_run_ends_what_it_began(endless: SimulatedMesh, number: signal.Signals, many: bool) -> None:
    """In a mesh of its own: the generation on the host stops, and the part of an answer that was there is a line."""
    gpumesh = endless.gpumesh
    arguments = ("run", "-f", "-") if many else ("run", "go on")
    async with gpumesh.started(*arguments, stdin="" if many else None) as process:
        if many:
            assert process.stdin is not None
            process.stdin.write(b"go on\nand on\n")
            process.stdin.close()
        await wait_until(lambda: endless.hosts["alpha"].counters.in_flight >= 1 + many, "it is under way")
        process.send_signal(number)
        async with asyncio.timeout(20):
            assert await process.wait() == 128 + number
            assert process.stdout is not None
            assert process.stderr is not None
            out, err = await process.stdout.read(), await process.stderr.read()
    assert b"Traceback" not in err
    assert not out or out.endswith(b"\n")
    await wait_until(lambda: endless.hosts["alpha"].counters.in_flight == 0, "the generation has stopped")
