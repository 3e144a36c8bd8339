"""Clients that hold connections, or slots on nodes, that others need."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvloop

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.topology import GatewaySpec
from tests.gateway.fleet import MODEL, A, RunningGateway, metric, node, send_raw, serve_hosts, serve_nodes
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
KEY = "k-crowded"

Run = Callable[[Coroutine[Any, Any, None]], None]
both = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def post(body: bytes, *more: str) -> bytes:
    lines = ["POST /api/chat HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat(prompt: str, *, stream: bool) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": stream}).encode()


def connections(fleet: RunningGateway) -> int:
    return fleet.gateway._server.connection_count


@asynccontextmanager
async def crowd(port: int, count: int, sent: bytes) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Opens so many connections one after the other; each sends these bytes and then waits."""
    async with AsyncExitStack() as stack:
        readers = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            writer.write(sent)
            readers.append(reader)
        yield readers


@both
@pytest.mark.parametrize(
    "sent", [b"", GET, GET[:-2], b"GET", b"\r\n"], ids=["nothing", "a request", "half", "a word", "blank"]
)
def test_idle_connections_do_not_lock_out_new_clients(run: Run, sent: bytes) -> None:
    async def main() -> None:
        async with serve_hosts(A, bounds=Bounds(max_connections=16)) as fleet, crowd(fleet.port, 40, sent) as crowded:
            await wait_until(lambda: connections(fleet) == 16, "all are taken")
            for _ in range(3):
                assert b"Ollama is running" in await send_raw(
                    fleet.port, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                )
            assert (await fleet.chat()).status_code == 200
            received = (await fleet.client.get("/metrics")).text
            assert metric(received, "gpumesh_client_connections_refused_total") == 0
            assert metric(received, "gpumesh_client_connections_closed_for_others_total") >= 24
            # the first was closed, after its answer if it had sent a request
            await asyncio.wait_for(crowded[0].read(), 10)
            assert crowded[0].at_eof()
            assert connections(fleet) <= 16

    run(main())


@both
def test_a_connection_with_a_request_is_not_closed_for_another(run: Run) -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            if not exchange.head.startswith(b"POST"):
                await probed(exchange)
                return
            await release.wait()
            await exchange.send(whole_response(b'{"done":true}'))

        async with (
            serve(slow) as scripted,
            serve_nodes((node("a", scripted.url),), bounds=Bounds(max_connections=4)) as fleet,
        ):
            served, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
            writer.write(post(chat("hi", stream=False), "Connection: close"))
            await wait_until(lambda: fleet.mesh.request_counters.in_flight == 1, "it is being served")
            async with crowd(fleet.port, 20, b""):
                await wait_until(lambda: connections(fleet) == 4, "all are taken")
                release.set()
                assert (await asyncio.wait_for(served.read(), 10)).endswith(b'{"done":true}')
            writer.close()

    run(main())


async def test_connections_without_a_key_are_closed_before_those_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROWDED_KEY", KEY)
    spec = GatewaySpec(api_key_env="CROWDED_KEY")
    authorized = GET.replace(b"\r\n\r\n", f"\r\nx-api-key: {KEY}\r\n\r\n".encode())
    async with serve_hosts(A, spec=spec, bounds=Bounds(max_connections=8)) as fleet:
        known, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        writer.write(authorized)
        await known.readuntil(b"Ollama is running")
        healthy = GET.replace(b"GET /", b"GET /healthz")
        async with crowd(fleet.port, 40, healthy):  # a health check needs no key
            await wait_until(lambda: connections(fleet) == 8, "all are taken")
            writer.write(authorized)
            await asyncio.wait_for(known.readuntil(b"Ollama is running"), 10)
        writer.close()


async def test_one_key_cannot_hold_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROWDED_KEY", KEY)
    release = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        if not exchange.head.startswith(b"POST"):
            await probed(exchange)
            return
        await release.wait()
        await exchange.send(whole_response(b'{"done":true}'))

    spec = GatewaySpec(api_key_env="CROWDED_KEY")
    async with (
        serve(slow) as scripted,
        serve_nodes((node("a", scripted.url, max_parallel=100),), spec=spec, bounds=Bounds(max_connections=8)) as fleet,
        crowd(fleet.port, 6, post(chat("hi", stream=False), f"x-api-key: {KEY}")) as waiting,
    ):
        await wait_until(lambda: fleet.mesh.request_counters.in_flight == 6, "they are being served")
        refused = await fleet.chat(headers={"x-api-key": KEY})
        assert refused.status_code == 503
        assert "with this key" in refused.json()["error"]
        assert refused.headers["Retry-After"] == "1"
        assert (await fleet.client.get("/healthz")).status_code == 200
        release.set()
        for reader in waiting:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        assert (await fleet.chat(headers={"x-api-key": KEY})).status_code == 200


# -- slots -----------------------------------------------------------------------------------------------------------

LINE = b'{"message": {"content": "%s"}, "done": false}\n' % (b"x" * 60_000)
DONE = b'{"done":true,"done_reason":"stop"}\n'


async def probed(exchange: Exchange) -> None:
    kind = exchange.head.split()[1].rpartition(b"/")[2].decode()
    known = {"version": "0.12.6"} if kind == "version" else {"models": [{"name": MODEL}]}
    await exchange.send(whole_response(json.dumps(known).encode()))


async def much_or_little(exchange: Exchange) -> None:
    """Answers a long prompt with more than any buffer holds, other prompts with one word."""
    if not exchange.head.startswith(b"POST"):
        await probed(exchange)
        return
    await exchange.send(chunked_head())
    if b"much" in exchange.body:
        for _ in range(500):
            await exchange.send(chunk(LINE))
    await exchange.send(chunk(DONE) + LAST_CHUNK)


async def small_window(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    ours = socket.socket()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ours.setblocking(False)
    await asyncio.get_running_loop().sock_connect(ours, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=ours, limit=1 << 16)


@both
def test_a_client_that_does_not_read_loses_its_slot_while_others_wait(run: Run) -> None:
    async def main() -> None:
        bounds = Bounds(stall_timeout_s=0.3)
        async with (
            serve(much_or_little) as scripted,
            serve_nodes((node("a", scripted.url, max_parallel=1),), bounds=bounds) as fleet,
        ):
            reader, writer = await small_window(fleet.port)
            writer.write(post(chat("much", stream=True), "Connection: close"))
            await wait_until(
                lambda: any(connection.writer.backpressured for connection in fleet.gateway._server._connections),
                "it takes no more",
            )
            async with asyncio.timeout(20):
                assert (await fleet.chat("little", stream=True)).status_code == 200
            assert fleet.mesh.request_counters.cancelled == 1
            received = b""
            while piece := await asyncio.wait_for(reader.read(1 << 20), 20):
                received = (received + piece)[-1000:]
            assert b'{"error":"the client took nothing of this answer for 0.3 s' in received
            assert received.endswith(b"0\r\n\r\n"), "the client gets the error when it reads on"
            writer.close()

    run(main())


async def test_a_client_that_does_not_read_keeps_its_slot_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = Bounds(stall_timeout_s=0.05)
    async with serve(much_or_little) as scripted, serve_nodes((node("a", scripted.url),), bounds=bounds) as fleet:
        reader, writer = await small_window(fleet.port)
        writer.write(post(chat("much", stream=True), "Connection: close"))
        await wait_until(
            lambda: any(connection.writer.backpressured for connection in fleet.gateway._server._connections),
            "it takes no more",
        )
        is_wanted, asked = fleet.mesh._dispatcher.slot_is_wanted, 0

        def counted(name: str) -> bool:
            nonlocal asked
            asked += 1
            return is_wanted(name)

        monkeypatch.setattr(fleet.mesh._dispatcher, "slot_is_wanted", counted)
        await wait_until(lambda: asked >= 3, "the client has taken nothing for three stall time-outs")
        assert fleet.mesh.request_counters.in_flight == 1
        received = b""
        while piece := await asyncio.wait_for(reader.read(1 << 20), 20):
            received = (received + piece)[-1000:]
        assert DONE in received
        writer.close()


@pytest.mark.slow
async def test_a_slow_but_steady_reader_keeps_its_slot() -> None:
    bounds = Bounds(stall_timeout_s=0.5)
    async with (
        serve(much_or_little) as scripted,
        serve_nodes((node("a", scripted.url, max_parallel=1),), bounds=bounds) as fleet,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port, limit=1 << 16)
        writer.write(post(chat("much", stream=True), "Connection: close"))
        await reader.readuntil(b"\r\n\r\n")
        waiting = asyncio.create_task(fleet.chat("little", stream=True))
        await wait_until(lambda: fleet.mesh._dispatcher.queued == 1, "another waits")
        received, began = b"", asyncio.get_running_loop().time()
        while piece := await asyncio.wait_for(reader.read(1 << 17), 20):
            received = (received + piece)[-1000:]
            await asyncio.sleep(0.01)  # a slow reader is what is tested
        assert asyncio.get_running_loop().time() - began > 2 * bounds.stall_timeout_s
        assert DONE in received
        assert (await waiting).status_code == 200
        writer.close()
