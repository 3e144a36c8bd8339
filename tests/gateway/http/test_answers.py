"""Answers: to clients that read slowly or not at all, in pieces, and what becomes of the connection."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from gpumesh.gateway.http import connection
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from tests.gateway.fleet import MODEL, node, send_raw, serve_nodes
from tests.gateway.http.raw_clients import (
    CHAT,
    GET,
    LARGE,
    SHORT,
    Run,
    answer_large,
    connect,
    on_both_loops,
    open_small_window,
    post,
    read_slowly,
    run_server,
)
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until


class Endless:
    """An Ollama whose answers never end; ``sent`` counts what could be sent."""

    def __init__(self) -> None:
        self.sent = 0
        self.gone = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        if not exchange.head.startswith(b"POST"):
            kind = exchange.head.split()[1].rpartition(b"/")[2].decode()
            known = {"version": "0.12.6"} if kind == "version" else {"models": [{"name": MODEL}]}
            await exchange.send(whole_response(json.dumps(known).encode()))
            return
        try:
            await exchange.send(chunked_head())
            while True:
                line = chunk(b'{"message": {"content": "%s"}, "done": false}\n' % (b"x" * 4000))
                await exchange.send(line)
                self.sent += len(line)
        finally:
            self.gone.set()


async def test_a_client_that_stops_reading_fills_no_memory_and_loses_its_slot() -> None:
    backend = Endless()
    async with serve(backend) as scripted, serve_nodes((node("a", scripted.url),), bounds=SHORT) as fleet:
        async with connect(fleet) as (reader, writer):
            writer.write(post(CHAT.replace(b"false", b"true")))
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.wait_for(backend.gone.wait(), 20)
            # The rest is the buffers of two sockets, whose size the kernel chooses.
            assert backend.sent < 32 << 20
            await wait_until(lambda: fleet.mesh.request_counters.in_flight == 0, "its slot is free")
        assert fleet.mesh.request_counters.cancelled == 1


@pytest.mark.slow
async def test_a_client_that_reads_slowly_is_served_to_the_end() -> None:
    total = 100 * 65536

    async def answer_large(exchange: Exchange) -> None:
        if not exchange.head.startswith(b"POST"):
            await Endless()(exchange)
            return
        await exchange.send(chunked_head())
        line = b'{"message": {"content": "%s"}, "done": false}\n' % (b"x" * 65000)
        for _ in range(total // len(line)):
            await exchange.send(chunk(line))
        await exchange.send(chunk(b'{"done":true,"done_reason":"stop"}\n') + b"0\r\n\r\n")

    async with serve(answer_large) as scripted, serve_nodes((node("a", scripted.url),), bounds=SHORT) as fleet:
        async with connect(fleet) as (reader, writer):
            writer.write(post(CHAT.replace(b"false", b"true"), "Connection: close"))
            size = 0
            while piece := await asyncio.wait_for(reader.read(1 << 17), 10):
                size += len(piece)
                await asyncio.sleep(0.02)  # a slow reader is what is tested
            assert size > total * 0.9
            assert piece == b""
        await wait_until(lambda: fleet.mesh.request_counters.served == 1, "it was served")


@on_both_loops
def test_an_answer_announces_the_end_of_its_connection(run: Run) -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def handler(request: Request) -> StreamingResponse:
            stream = request.start_stream(())
            stream.write(b"begun")
            begun.set()
            async for _ in request.read_body_pieces():
                pass
            stream.finish()
            return stream

        async with run_server(handler, Bounds()) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(post(b"", length=1))
            await asyncio.wait_for(begun.wait(), 10)
            writer.write(b"x")
            received = await asyncio.wait_for(reader.read(), 10)
            writer.close()
        assert b"Connection: close\r\n" in received
        assert received.endswith(b"0\r\n\r\n")

    run(main())


@on_both_loops
@pytest.mark.slow
def test_a_large_answer_may_be_taken_slowly(run: Run) -> None:
    async def main() -> None:
        async with run_server(answer_large) as running:
            reader, writer = await open_small_window(running.port, receive=1 << 16)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            began = asyncio.get_running_loop().time()
            assert await read_slowly(reader, 1 << 30, each=1 << 16, pause_s=0.02) > len(LARGE)
            assert asyncio.get_running_loop().time() - began > SHORT.write_timeout_s * 2
            writer.close()

            reader, writer = await open_small_window(running.port)
            writer.write(GET)
            await wait_until(lambda: running.server.connection_count == 1, "the connection is made")
            await wait_until(lambda: running.server.connection_count == 0, "a client that takes nothing is cut off")
            writer.close()

    run(main())


@on_both_loops
@pytest.mark.parametrize("ask", [GET, b"GET / HTTP/1.0\r\n\r\n", post(b"", length=1)], ids=["keep", "close", "linger"])
def test_a_client_that_does_not_take_the_end_of_an_answer_is_cut_off(run: Run, ask: bytes) -> None:
    """So little that it does not count as a full buffer."""

    async def main() -> None:
        async def handler(request: Request) -> Response:
            assert isinstance(request._connection, connection.ClientConnection)
            transport = request._connection._transport
            assert transport is not None
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            return Response(b"x" * 60_000)

        async with run_server(handler) as running:
            _, writer = await open_small_window(running.port)
            writer.write(ask)
            await wait_until(lambda: len(running.seen) == 1, "the handler has been called")
            await wait_until(lambda: running.server.connection_count == 0, "the connection is gone")
            writer.close()

    run(main())


@on_both_loops
def test_a_partial_answer_is_never_ended_as_whole(run: Run) -> None:
    async def main() -> None:
        async def handler(request: Request) -> Response | StreamingResponse:
            stream = request.start_stream(())
            if request.path != "/before":
                stream.write(b"a part")
            if request.path == "/reply":
                return Response(b"another")
            if request.path != "/unended":
                raise ValueError(request.path)
            return stream

        async with run_server(handler) as running:
            for path in ("/after", "/reply", "/unended"):
                received = await send_raw(running.port, GET.replace(b"/", path.encode(), 1))
                assert received.endswith(b"\r\n\r\n6\r\na part\r\n")
            assert (await send_raw(running.port, GET.replace(b"/", b"/before", 1))).startswith(b"HTTP/1.1 500 ")

    run(main())


@on_both_loops
def test_a_stream_calls_back_when_it_is_writable_or_its_client_is_gone(run: Run) -> None:
    async def main() -> None:
        streams: list[StreamingResponse] = []
        calls = asyncio.Queue[bool]()

        async def handler(request: Request) -> StreamingResponse:
            stream = request.start_stream(())
            streams.append(stream)
            stream.on_writable = lambda: calls.put_nowait(stream.backpressured)
            while not stream.backpressured:
                stream.write(b"x" * 65536)
            await asyncio.Event().wait()
            raise AssertionError

        async with run_server(handler, Bounds()) as running:
            reader, writer = await open_small_window(running.port)
            writer.write(GET)
            await wait_until(lambda: bool(streams) and streams[0].backpressured, "the client takes no more")
            assert calls.empty()
            assert await read_slowly(reader, 1 << 20, each=1 << 20, pause_s=0.0) >= 1 << 20
            while calls.empty():
                await reader.read(1 << 20)
            assert calls.get_nowait() is False
            writer.transport.abort()
            await asyncio.wait_for(calls.get(), 10)
            with pytest.raises(ConnectionResetError):
                streams[0].write(b"x")

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_a_client_that_stops_reading_fills_no_memory_and_loses_its_slot,
        test_a_client_that_reads_slowly_is_served_to_the_end,
    ],
)
def test_by_itself_on_uvloop(check: Callable[[], Coroutine[None, None, None]]) -> None:
    uvloop.run(check())
