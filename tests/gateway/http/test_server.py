"""How many connections there may be, and how connections and the server end."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import struct
import weakref
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from gpumesh.gateway.http import connection, server
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from tests.gateway.fleet import A, metric, send_raw, serve_hosts
from tests.gateway.http.raw_clients import (
    GET,
    LARGE,
    Run,
    answer_fine,
    answer_large,
    connect,
    count_connections,
    echo,
    on_both_loops,
    open_small_window,
    post,
    read_slowly,
    run_server,
)
from tests.tunnels.polling import wait_until


async def test_past_the_bound_connections_are_refused_with_a_reason() -> None:
    async with serve_hosts(A, bounds=Bounds(max_connections=3)) as fleet:
        async with connect(fleet) as (_, first), connect(fleet) as (_, second), connect(fleet) as (_, third):
            for writer in (first, second, third):  # with a request under way: an idle connection would be evicted
                writer.write(post(b"{", length=10))
            await wait_until(lambda: len(fleet.gateway._active) == 3, "all three are under way")
            refused = await send_raw(fleet.port, GET)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 1\r\n" in refused
        await wait_until(lambda: count_connections(fleet) == 0, "the connections are gone")
        received = (await fleet.client.get("/metrics")).text
        assert metric(received, "gpumesh_client_connections_refused_total") == 1
        assert metric(received, "gpumesh_client_connections") == 1


@on_both_loops
def test_written_answers_arrive_when_the_server_ends(run: Run) -> None:
    async def main() -> None:
        async with run_server(answer_large, Bounds(linger_s=20.0)) as running:
            reader, writer = await open_small_window(running.port)
            other = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(GET)
            await wait_until(
                lambda: any(connection.writer.unsent_bytes for connection in running.server._connections),
                "the answer has been written",
            )
            closing = asyncio.create_task(running.server.close())
            assert await asyncio.wait_for(other[0].read(), 10) == b"", "idle ones need not wait for it"
            assert not closing.done()
            assert await read_slowly(reader, 1 << 30, each=1 << 20, pause_s=0.0) > len(LARGE)
            await asyncio.wait_for(closing, 10)
            assert running.server.connection_count == 0
            writer.close()
            other[1].close()

    run(main())


@on_both_loops
def test_the_end_of_the_server_does_not_wait_for_a_client_that_takes_nothing(run: Run) -> None:
    async def main() -> None:
        async with run_server(answer_large, Bounds(linger_s=0.1)) as running:
            _, writer = await open_small_window(running.port)
            writer.write(GET)
            await wait_until(
                lambda: any(connection.writer.unsent_bytes for connection in running.server._connections),
                "the answer has been written",
            )
            await asyncio.wait_for(running.server.close(), 10)
            assert running.server.connection_count == 0
            writer.close()

    run(main())


@on_both_loops
def test_a_draining_connection_ends_after_its_answer(run: Run) -> None:
    async def main() -> None:
        async with run_server(answer_large, Bounds()) as running:
            reader, writer = await open_small_window(running.port)
            writer.write(GET)
            await wait_until(
                lambda: any(connection.writer.unsent_bytes for connection in running.server._connections),
                "the answer has been written",
            )
            running.server.close_idle()
            assert await read_slowly(reader, 1 << 30, each=1 << 20, pause_s=0.0) > len(LARGE)
            writer.close()

    run(main())


@on_both_loops
def test_a_client_past_the_bound_that_is_still_sending_sees_the_refusal(run: Run) -> None:
    async def main() -> None:
        async with run_server(answer_fine, Bounds(max_connections=0)) as running:
            for _ in range(20):
                assert (await send_raw(running.port, post(b" " * 2_000_000))).startswith(b"HTTP/1.1 503 ")
            held = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(server.MAX_LINGERING + 10)]
            await wait_until(lambda: running.server.refused_connections == 20 + len(held), "all were turned away")
            assert len(running.server._lingering) <= server.MAX_LINGERING
            await running.server.close()
            assert not running.server._lingering
            for reader, writer in held:
                assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 503 ")
                writer.close()

    run(main())


@on_both_loops
def test_a_client_that_is_still_sending_much_sees_the_refusal(run: Run) -> None:
    async def main() -> None:
        async def handler(_: Request) -> Response:
            return Response(b"no", status=413)

        async with run_server(handler, Bounds(linger_s=10.0)) as running:
            for _ in range(10):
                assert (await send_raw(running.port, post(b" " * (10 << 20)))).startswith(b"HTTP/1.1 413 ")

    run(main())


@on_both_loops
def test_a_client_that_resets_after_the_last_byte_is_no_error(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Between its last byte and the end of our side: then there is none to end."""

    async def main() -> None:
        client = socket.socket()

        async def handler(request: Request) -> StreamingResponse:
            stream = request.start_stream(())
            stream.write(b"x")
            stream.finish()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # a reset
            return stream

        async with run_server(handler) as running:
            await asyncio.to_thread(client.connect, ("127.0.0.1", running.port))
            client.sendall(post(b"", length=1))
            await wait_until(lambda: len(running.seen) == 1, "the handler has been called")
            await wait_until(lambda: running.server.connection_count == 0, "the connection is gone")

    with caplog.at_level(logging.INFO):
        run(main())
    assert caplog.text == ""


@on_both_loops
def test_nothing_of_a_connection_waits_for_the_garbage_collector(run: Run) -> None:
    async def main() -> None:
        alive: weakref.WeakSet[connection.ClientConnection] = weakref.WeakSet()
        async with run_server(echo) as running:
            for data in (GET, GET * 3, post(b"abc"), post(b"", length=9), GET[:9], b"zyzzyva\r\n", GET * 100):
                _, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(data)
                await wait_until(lambda: running.server.connection_count == 1, "the connection is made")
                await asyncio.sleep(0.01)
                alive.update(running.server._connections)
                assert alive
                writer.transport.abort()
                running.seen.clear()
                await wait_until(lambda: running.server.connection_count == 0, "the connection is gone")
                running.seen.clear()
                await wait_until(lambda: not alive, f"nothing is left after {data[:20]!r}")

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [test_past_the_bound_connections_are_refused_with_a_reason],
)
def test_by_itself_on_uvloop(check: Callable[[], Coroutine[None, None, None]]) -> None:
    uvloop.run(check())
