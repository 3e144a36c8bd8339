"""Requests that a client sends ahead of the answers, and a client that is not read meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from gpumesh.gateway.http import request_queue
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from tests.gateway.fleet import A, RunningGateway, send_raw, serve_hosts
from tests.gateway.http.raw_clients import (
    GET,
    SHORT,
    Run,
    connect,
    expect_silence,
    on_both_loops,
    post,
    read_answer,
    run_server,
)
from tests.tunnels.polling import wait_until


async def test_http10_and_pipelining_clients_are_served(short: RunningGateway) -> None:
    old = await send_raw(short.port, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert old.endswith(b"Ollama is running")
    both = await send_raw(short.port, GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert both.count(b"Ollama is running") == 2


async def test_many_pipelined_requests_do_not_count_as_one_large_head(short: RunningGateway) -> None:
    """However the network cuts it: here in the middle of a head, behind more bytes than a head may have."""
    ahead = GET * (SHORT.max_head_bytes // len(GET) + 10)
    async with connect(short) as (reader, writer):
        writer.write(ahead + GET[:20])
        for _ in range(ahead.count(b"GET")):
            assert (await asyncio.wait_for(read_answer(reader), 10))[0] == 200
        writer.write(GET[20:])
        assert (await asyncio.wait_for(read_answer(reader), 10))[0] == 200


async def test_endless_pipelining_pauses_reading() -> None:
    """Its answers are not read either: neither they nor what has been asked for may pile up here."""
    async with serve_hosts(A) as fleet, connect(fleet) as (_, writer):
        sent = 0
        try:
            async with asyncio.timeout(20):
                while sent < 256 << 20:
                    writer.write(GET * 1000)
                    sent += len(GET) * 1000
                    await asyncio.wait_for(writer.drain(), 1.0)
                    await asyncio.sleep(0)
        except TimeoutError:
            pass
        assert sent < 64 << 20, "the rest is the buffers of two sockets, whose size the kernel chooses"
        [connection] = (connection for connection in fleet.gateway._server._connections if connection._queue)
        assert len(connection._queue) < 1_000, "only what one slice of a read brought waits"
        transport = connection._transport
        assert transport is not None
        assert transport.get_write_buffer_size() < 1 << 20


@on_both_loops
def test_an_unread_body_does_not_block_the_next_request(run: Run) -> None:
    """Its last bytes are those at which the client is no longer read."""

    async def until_it_is_there(request: Request) -> Response:
        await wait_until(lambda: request.body_received, "the whole body is there")
        return Response(b"fine")

    async def main() -> None:
        async with run_server(until_it_is_there) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            for _ in range(3):
                writer.write(post(b"x" * (request_queue.MAX_BUFFERED_BODY_BYTES + 1)))
                assert await asyncio.wait_for(read_answer(reader), 10) == (200, b"fine")
            writer.close()

    run(main())


@on_both_loops
def test_a_pipelining_client_does_not_delay_others(run: Run) -> None:
    turns, seen = 0, []

    async def handler(_: Request) -> Response:
        seen.append(turns)
        return Response(b"fine")

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        async with run_server(handler) as running:
            counting = asyncio.create_task(count())
            await send_raw(running.port, GET * 300 + b"GET / HTTP/1.0\r\n\r\n")
            counting.cancel()
        assert len(seen) == 301
        assert seen[-1] - seen[0] >= 250

    run(main())


@on_both_loops
@pytest.mark.slow
def test_the_head_timeout_does_not_run_while_reading_is_paused(run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def handler(_: Request) -> Response:
            await go.wait()
            return Response(b"fine")

        async with run_server(handler, Bounds(head_timeout_s=1.0)) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(GET * 30 + GET[:20])
            await expect_silence(reader, 1.3)
            go.set()
            for _ in range(30):
                assert (await asyncio.wait_for(read_answer(reader), 10))[0] == 200
            writer.write(GET[20:])
            assert (await asyncio.wait_for(read_answer(reader), 10))[0] == 200
            writer.close()

    run(main())


@on_both_loops
@pytest.mark.parametrize("ahead", [GET * 100, post(b"", length=1 << 20) + b" " * (1 << 19)], ids=["requests", "a body"])
def test_a_client_that_leaves_while_reading_is_paused_is_noticed(run: Run, ahead: bytes) -> None:
    async def main() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(_: Request) -> Response:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

        async with run_server(handler, Bounds()) as running:
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(GET + ahead)
            await asyncio.wait_for(begun.wait(), 10)
            [connection] = running.server._connections
            await wait_until(lambda: connection._reader.paused, "reading is paused")
            writer.transport.abort()
            await asyncio.wait_for(cancelled.wait(), 10)

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [test_http10_and_pipelining_clients_are_served],
)
def test_on_uvloop(check: Callable[[RunningGateway], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serve_hosts(A, bounds=SHORT) as fleet:
            await check(fleet)

    uvloop.run(main())
