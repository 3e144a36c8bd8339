"""The states of a connection, and what a debugger shows of it."""

from __future__ import annotations

import asyncio

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.connection import ClientConnection, ClientConnectionState
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from tests.gateway.fleet import send_raw
from tests.gateway.http.raw_clients import GET, Run, answer_fine, on_both_loops, post, read_answer, run_server
from tests.tunnels.polling import wait_until


@on_both_loops
def test_a_connection_goes_through_its_states(run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def handler(_: Request) -> Response:
            await go.wait()
            return Response(b"fine")

        async with run_server(handler, Bounds(linger_s=20.0)) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            await wait_until(lambda: running.server.connection_count == 1, "the connection is made")
            [connection] = running.server._connections
            host, port = writer.get_extra_info("sockname")
            assert repr(connection) == f"<ClientConnection {host}:{port} READING 0 queued>"
            assert repr(connection._reader) == "<RequestReader reading AWAITING_HEAD, 0 bytes unparsed>"
            assert repr(connection.writer) == "<ClientWriter writable, 0 bytes unsent>"
            writer.write(GET * 3)
            await wait_until(lambda: len(running.seen) == 1, "the first is being answered")
            assert repr(connection) == f"<ClientConnection {host}:{port} READING 2 queued>"
            assert repr(running.seen[0]) == "<Request GET / <RequestBody complete, 0 bytes buffered> None>"
            writer.write(b"no request\r\n\r\n")
            await wait_until(lambda: connection.state is ClientConnectionState.REFUSING, "it is refused")
            assert repr(connection) == f"<ClientConnection {host}:{port} REFUSING 3 queued>"
            go.set()
            for _ in range(3):
                assert await read_answer(reader) == (200, b"fine")
            assert await read_answer(reader) == (400, b"this is not HTTP\n")
            assert await reader.read() == b"", "our side has ended"
            assert repr(connection) == f"<ClientConnection {host}:{port} LINGERING 0 queued>"
            writer.close()
            await wait_until(lambda: connection.state is ClientConnectionState.CLOSED, "the connection is gone")
            assert repr(connection) == f"<ClientConnection {host}:{port} CLOSED 0 queued>"
            assert repr(connection.writer) == "<ClientWriter closed, 0 bytes unsent>"

    run(main())


@on_both_loops
def test_a_draining_server_lets_requests_end(run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def handler(_: Request) -> Response:
            await go.wait()
            return Response(b"fine")

        async with run_server(handler) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(post(b"abc"))
            await wait_until(lambda: len(running.seen) == 1, "it is being answered")
            [connection] = running.server._connections
            assert repr(running.server).startswith("<Server serving, 1 of ")
            running.server.close_idle()
            assert connection.state is ClientConnectionState.DRAINING
            assert repr(running.server).startswith("<Server closing, 1 of ")
            go.set()
            assert b"Connection: close\r\n" in await reader.read()
            writer.close()

    run(main())


async def test_a_connection_before_it_is_made() -> None:
    async with run_server(answer_fine) as running:
        connection = ClientConnection(running.server, asyncio.get_running_loop())
        assert repr(connection) == "<ClientConnection not connected READING 0 queued>"


async def test_how_an_error_looks_is_given_from_outside() -> None:
    def render(status: int, message: str) -> Response:
        return Response(f"<h1>{message}</h1>".encode(), status=status, content_type="text/html")

    async def fail(request: Request) -> Response:
        raise ZeroDivisionError(request.path)

    async with run_server(fail, render_error=render) as running:
        refused = await send_raw(running.port, b"no request\r\n\r\n")
        assert b"Content-Type: text/html\r\n" in refused
        assert refused.endswith(b"<h1>this is not HTTP</h1>")
        failed = await send_raw(running.port, GET)
        assert failed.startswith(b"HTTP/1.1 500 ")
        assert failed.endswith(b"<h1>the gateway failed inside</h1>")
