"""Against real sockets: what a backend can do to a request, and what becomes of the connection."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.errors import BackendUnreachable, StreamCut
from gpumesh.event_loop.slice_queue import SLICE_BYTES
from gpumesh.mesh.requests.body_sink import BUFFER_BYTES
from gpumesh.mesh.requests.connections.upstream_connection import ReadState
from gpumesh.mesh.requests.upstream import Upstream, UpstreamResponse
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

CALL = HttpCall("POST", "/api/chat?x=1", b'{"model": "m"}', (("Content-Type", "application/json"),))


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with asyncio.timeout(20), Upstream() as upstream:
        yield upstream


async def send(upstream: Upstream, url: str) -> UpstreamResponse:
    return await upstream.request(url, CALL, CALL.headers, node="n", host="127.0.0.1:11434")


async def read_all(response: UpstreamResponse) -> bytes:
    pieces = []
    while data := await response.read():
        pieces.append(data)
    return b"".join(pieces)


async def test_the_request_arrives_as_given_and_the_connection_is_used_again(upstream: Upstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"n": %d}' % exchange.number))

    async with serve(script) as server:
        for number in (1, 2, 3):
            response = await send(upstream, server.url)
            assert response.status == 200
            assert response.content_type == "application/json"
            assert await read_all(response) == b'{"n": %d}' % number
        assert server.connections == 1
        request = server.requests[0]
        assert request.head.startswith(b"POST /api/chat?x=1 HTTP/1.1\r\n")
        assert b"Host: 127.0.0.1:11434\r\n" in request.head
        assert request.body == CALL.body


async def test_a_kept_connection_that_went_stale_is_replaced_unseen(upstream: Upstream) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.number == 2:
            exchange.reset()
            return
        await exchange.send(whole_response(b"{}"))

    async with serve(script) as server:
        for _ in range(6):
            assert await read_all(await send(upstream, server.url)) == b"{}"
        assert server.connections == 6


@pytest.mark.parametrize("end", ["reset", "close"])
async def test_no_answer_on_a_new_connection_is_the_backends_failure(upstream: Upstream, end: str) -> None:
    async def script(exchange: Exchange) -> None:
        getattr(exchange, end)()

    async with serve(script) as server:
        with pytest.raises(BackendUnreachable) as failed:
            await send(upstream, server.url)
        assert failed.value.node == "n"
        assert server.connections == 1


async def test_refused(upstream: Upstream) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(BackendUnreachable):
            await send(upstream, f"http://127.0.0.1:{taken.getsockname()[1]}")


async def test_nonsense_instead_of_http_is_the_backends_failure(upstream: Upstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    async with serve(script) as server:
        with pytest.raises(BackendUnreachable):
            await send(upstream, server.url)


@pytest.mark.parametrize("style", ["short body", "no last chunk", "reset in the body"])
async def test_a_body_that_stops_short_is_cut(upstream: Upstream, style: str) -> None:
    async def script(exchange: Exchange) -> None:
        if style == "short body":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
            exchange.close()
            return
        await exchange.send(chunked_head() + chunk(b"abc"))
        if style == "reset in the body":
            await exchange.wait_client_gone()
            exchange.reset()
        else:
            exchange.close()

    async with serve(script) as server:
        response = await send(upstream, server.url)
        assert await response.read() == b"abc"
        if style == "reset in the body":
            server.requests[0].reset()
        with pytest.raises(StreamCut):
            await response.read()


async def test_pieces_come_as_they_are_sent(upstream: Upstream) -> None:
    go_on = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(b"one\n"))
        await go_on.wait()
        await exchange.send(chunk(b"two\n") + LAST_CHUNK)

    async with serve(script) as server:
        response = await send(upstream, server.url)
        assert await response.read() == b"one\n"
        go_on.set()
        assert await response.read() == b"two\n"
        assert await response.read() == b""


async def test_abort_and_cancel_close_the_connection(upstream: Upstream) -> None:
    gone = asyncio.Semaphore(0)

    async def script(exchange: Exchange) -> None:
        if b"x=1" in exchange.head and exchange.number == 1 and server.connections == 1:
            await exchange.send(chunked_head() + chunk(b"one\n"))
        await exchange.wait_client_gone()
        exchange.closed = True
        gone.release()

    async with serve(script) as server:
        response = await send(upstream, server.url)
        await response.read()
        response.abort()
        response.abort()
        await gone.acquire()
        waiting = asyncio.create_task(send(upstream, server.url))
        while len(server.requests) < 2:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await gone.acquire()


async def test_an_abort_ends_a_read_that_waits(upstream: Upstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(b"one\n"))
        await exchange.wait_client_gone()
        exchange.closed = True

    async with serve(script) as server:
        response = await send(upstream, server.url)
        await response.read()
        waiting = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        response.abort()
        with pytest.raises(StreamCut):
            await waiting


async def answered(upstream: Upstream, answer: bytes, method: str = "POST") -> tuple[UpstreamResponse, bytes]:
    async def script(exchange: Exchange) -> None:
        await exchange.send(answer)
        exchange.close()

    async with serve(script) as server:
        call = HttpCall(method, "/x")
        response = await upstream.request(server.url, call, (), node="n")
        return response, await read_all(response)


async def test_a_body_without_a_length_lasts_until_the_connection_ends(upstream: Upstream) -> None:
    _, body = await answered(upstream, b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nto the end")
    assert body == b"to the end"


async def test_head_has_a_length_and_no_body(upstream: Upstream) -> None:
    response, body = await answered(upstream, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", "HEAD")
    assert (response.status, response.content_length, body) == (200, 100, b"")


async def test_an_interim_answer_is_passed_over(upstream: Upstream) -> None:
    response, body = await answered(
        upstream, b"HTTP/1.1 100 Continue\r\nX-Interim: 1\r\n\r\n" + whole_response(b"{}", status="201 Created")
    )
    assert (response.status, body) == (201, b"{}")
    assert "X-Interim" not in dict(response.headers)


async def test_of_a_head_only_what_clients_read_is_kept(upstream: Upstream) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=utf-8\r\nConnection: close\r\nX-Name: caf\xc3\xa9\r\n"
        b"retry-after: 3\r\nSet-Cookie: a=b\r\n"
    )
    response, _ = await answered(upstream, head + b"Content-Length: 0\r\n\r\n")
    assert response.headers == (("Content-Type", "text/plain; charset=utf-8"), ("Retry-After", "3"))
    assert (response.content_type, response.problem) == ("text/plain", None)


async def test_a_head_without_end_is_the_backends_failure(upstream: Upstream) -> None:
    for head in (b"X-Long: " + b"a" * 70_000, b"X: 1\r\n" * 10_000):
        with pytest.raises(BackendUnreachable, match=r"64 KiB|256 fields"):
            await answered(upstream, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")


@pytest.mark.parametrize("piece", [b"x", b"xy", b"x" * 5000])
async def test_a_large_answer_in_whatever_chunks_is_whole_and_its_connection_used_again(
    upstream: Upstream, piece: bytes
) -> None:
    count = 300_000 // len(piece)

    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(piece) * count + LAST_CHUNK)

    async with serve(script) as server:
        for _ in range(2):
            assert await read_all(await send(upstream, server.url)) == piece * count
        assert server.connections == 1


@pytest.mark.parametrize("reads", [0, 1])
async def test_what_a_reader_leaves_unread_is_bounded_in_memory(upstream: Upstream, reads: int) -> None:
    async def script(exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await exchange.send(chunked_head() + chunk(b"xy") * 1_000_000)

    async with serve(script) as server:
        response = await send(upstream, server.url)
        for _ in range(reads):
            await response.read()
        connection = response._exchange.connection
        assert connection is not None
        await wait_until(lambda: connection._read_state is ReadState.BACKPRESSURED, "the server is read no further")
        assert BUFFER_BYTES < len(response._exchange.buffer) < BUFFER_BYTES + SLICE_BYTES
        response.abort()


async def test_what_follows_an_answer_in_the_same_read_spoils_the_connection(upstream: Upstream) -> None:
    """However much it is, and wherever the answer ends: what was read ahead is never the next request's answer."""
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"

    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(b"x") * 5000 + LAST_CHUNK + evil * 5000)

    async with serve(script) as server:
        for _ in range(3):
            assert await read_all(await send(upstream, server.url)) == b"x" * 5000
        assert server.connections == 3


async def test_a_body_up_to_the_end_of_its_connection_is_whole_though_it_is_read_slowly(upstream: Upstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 500_000)
        exchange.close()

    async with serve(script) as server:
        response = await send(upstream, server.url)
        await wait_until(lambda: len(response._exchange.buffer) > BUFFER_BYTES, "more is there than is read at once")
        assert len(await read_all(response)) == 500_000


async def test_so_it_is_through_tls_which_ends_with_what_was_read_before(
    upstream: Upstream,
    trusted_tls: ssl.SSLContext,
) -> None:
    """There a connection may be lost while a part of what came on it waits to be parsed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 150_000)
        await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=trusted_tls)
    try:
        response = await send(upstream, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await wait_until(lambda: len(response._exchange.buffer) > BUFFER_BYTES, "more is there than is read at once")
        assert len(await read_all(response)) == 150_000
    finally:
        server.close()
        await server.wait_closed()


async def test_more_than_was_announced_spoils_the_connection_and_not_the_answer(upstream: Upstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(whole_response(b"{}") + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")

    async with serve(script) as server:
        for _ in range(3):
            assert await read_all(await send(upstream, server.url)) == b"{}"
        assert server.connections == 3


async def test_a_slow_reader_holds_back_the_server(upstream: Upstream) -> None:
    written = 0

    async def script(exchange: Exchange) -> None:
        nonlocal written
        exchange.writer.transport.set_write_buffer_limits(high=1 << 16)
        await exchange.send(chunked_head())
        for _ in range(1000):
            await exchange.send(chunk(b"x" * 65536))
            written += 65536
        await exchange.send(LAST_CHUNK)

    async with serve(script) as server:
        response = await send(upstream, server.url)
        last = -1
        while written != last:  # until nothing moves any more
            last = written
            await asyncio.sleep(0.1)
        assert written < 32 << 20, "the rest waits at the server"
        assert len(await read_all(response)) == 1000 * 65536


async def test_a_line_end_in_a_header_never_reaches_a_backend(upstream: Upstream) -> None:
    with pytest.raises(ValueError, match="line end"):
        await upstream.request("http://127.0.0.1:9", CALL, [("X-Evil", "a\r\nX-Other: b")], node="n")


async def test_idle_connections_are_closed_after_a_while(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumesh.mesh.requests.connections.connection_pool.KEEPALIVE_S", 0.05)
    gone = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.send(whole_response(b"{}"))
        await exchange.wait_client_gone()
        exchange.closed = True
        gone.set()

    async with serve(script) as server:
        assert await read_all(await send(upstream, server.url)) == b"{}"
        await gone.wait()


async def test_what_a_debugger_shows_of_a_connection_its_pool_and_its_response(upstream: Upstream) -> None:
    go_on = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(b"one\n"))
        await go_on.wait()
        await exchange.send(LAST_CHUNK)

    async with serve(script) as server:
        assert repr(upstream) == "<Upstream <ConnectionPool 0 connections, 0 idle>>"
        response = await send(upstream, server.url)
        connection = response._exchange.connection
        assert repr(connection) == f"<UpstreamConnection 127.0.0.1:{server.port} RECEIVING_BODY, 1 requests>"
        await response.read()
        assert repr(response) == "<UpstreamResponse n 200 under way <BufferedSink 0 bytes>>"
        go_on.set()
        assert await read_all(response) == b""
        assert repr(response) == "<UpstreamResponse n 200 ended <BufferedSink 0 bytes complete>>"
        assert repr(connection) == f"<UpstreamConnection 127.0.0.1:{server.port} IDLE, 1 requests>"
        assert repr(upstream) == "<Upstream <ConnectionPool 1 connections, 1 idle>>"
        assert connection is not None
        connection.abort()
        assert "CLOSED" in repr(connection)
