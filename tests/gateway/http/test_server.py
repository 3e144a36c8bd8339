"""The bounds that a server needs in front of hardware that costs money, on raw sockets."""

from __future__ import annotations

import asyncio
import gc
import gzip
import itertools
import json
import logging
import random
import re
import socket
import struct
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from gpumesh.gateway.http import connection, request_queue, server
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.server import Server
from gpumesh.gateway.http.streaming_response import StreamingResponse
from tests.gateway.fleet import MODEL, A, RunningGateway, metric, node, send_raw, serve_hosts, serve_nodes
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

SHORT = Bounds(
    head_timeout_s=0.3,
    body_timeout_s=0.3,
    min_bytes_per_s=1000,
    write_timeout_s=0.5,
    keepalive_s=1.0,
    linger_s=0.2,
    max_body_bytes=10_000,
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": False}).encode()


def post(body: bytes, *more: str, length: int | None = None, path: str = "/api/chat") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode() + body


@pytest.fixture
async def short() -> AsyncIterator[RunningGateway]:
    async with serve_hosts(A, bounds=SHORT) as fleet:
        yield fleet


@asynccontextmanager
async def connected(fleet: RunningGateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One answer with a length, on a connection that stays."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def nothing_more(reader: asyncio.StreamReader, seconds: float) -> None:
    """Neither a byte nor the end comes in that time."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), seconds)


# -- heads -----------------------------------------------------------------------------------------------------------


async def test_a_head_that_stops_is_given_up(short: RunningGateway) -> None:
    answer = await send_raw(short.port, GET[:-2])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close\r\n" in answer


async def test_a_head_that_trickles_is_given_up(short: RunningGateway) -> None:
    async with connected(short) as (reader, writer):
        written = 0
        for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Slow: 1\r\n" * 100:
            writer.write(bytes([byte]))
            written += 1
            try:
                answer = await asyncio.wait_for(reader.read(10_000), 0.03)
            except TimeoutError:
                continue
            break
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert written < 100


async def test_a_second_head_has_the_same_bound(short: RunningGateway) -> None:
    async with connected(short) as (reader, writer):
        writer.write(GET)
        assert (await answer_of(reader))[0] == 200
        writer.write(GET[:20])
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
async def test_who_waits_between_two_requests_is_left_alone_for_a_while(short: RunningGateway) -> None:
    async with connected(short) as (reader, writer):
        for _ in range(2):
            writer.write(GET)
            assert (await answer_of(reader))[0] == 200
            await nothing_more(reader, SHORT.head_timeout_s * 1.7)
        assert await asyncio.wait_for(reader.read(), 10) == b"", "then the connection is closed without a word"


@pytest.mark.slow
async def test_a_head_that_begins_as_the_connection_would_be_closed_is_heard() -> None:
    async with (
        serve_hosts(A, bounds=Bounds(head_timeout_s=5.0, keepalive_s=0.5)) as fleet,
        connected(fleet) as (reader, writer),
    ):
        writer.write(GET)
        assert (await answer_of(reader))[0] == 200
        writer.write(GET[:10])
        await nothing_more(reader, 1.0)
        writer.write(GET[10:])
        assert (await answer_of(reader))[0] == 200
        assert await asyncio.wait_for(reader.read(), 10) == b""


@pytest.mark.slow
async def test_a_connection_that_never_says_anything_is_closed(short: RunningGateway) -> None:
    async with connected(short) as (reader, _):
        assert await asyncio.wait_for(reader.read(), 10) == b""


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40_000, 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: 1\r\n" % one for one in range(200)), 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon zyzzyva\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"zyzzyva\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03zyzzyva\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", 400),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n", 400),
    ],
)
async def test_what_is_no_request_is_refused_without_its_words(short: RunningGateway, head: bytes, status: int) -> None:
    answer = await send_raw(short.port, head + b"\r\n")
    assert re.match(rb"HTTP/1\.[01] %d " % status, answer), "1.0: what was said may be no 1.1 at all"
    words = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "zyzzyva" not in words
    assert "aaaa" not in words


async def test_old_and_pipelined_clients_are_served(short: RunningGateway) -> None:
    old = await send_raw(short.port, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert old.endswith(b"Ollama is running")
    both = await send_raw(short.port, GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert both.count(b"Ollama is running") == 2


async def test_an_offer_of_another_protocol_is_passed_over(short: RunningGateway) -> None:
    """JDK's HTTP client offers HTTP/2 in the first request of each connection, with a body behind it."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + chunk(CHAT[:20]) + chunk(CHAT[20:]) + b"0\r\n\r\n"
    offered = post(CHAT, *offer)
    chunked = offered.partition(b"\r\n\r\n")[0].replace(b"Content-Length: %d\r\n" % len(CHAT), b"") + b"\r\n" + chunks
    get = GET[:-2] + "\r\n".join([*offer, "", ""]).encode()
    async with connected(short) as (reader, writer):
        for data in (offered, get, chunked, get + get + offered):
            writer.write(data)
            for _ in range(data.count(b"Upgrade: h2c")):
                assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
        for byte in offered:  # and wherever the network cuts it
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
    assert (await send_raw(short.port, b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n\x16\x03")).startswith(
        b"HTTP/1.1 404 "
    )


async def test_much_that_is_asked_ahead_is_no_large_head(short: RunningGateway) -> None:
    """However the network cuts it: here in the middle of a head, behind more bytes than a head may have."""
    ahead = GET * (SHORT.max_head_bytes // len(GET) + 10)
    async with connected(short) as (reader, writer):
        writer.write(ahead + GET[:20])
        for _ in range(ahead.count(b"GET")):
            assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
        writer.write(GET[20:])
        assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200


async def test_a_head_that_never_gets_whole_is_bounded() -> None:
    async with serve_hosts(A) as fleet, connected(fleet) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(40):
            writer.write(b"a" * 1000)
            await writer.drain()
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 431 ")


async def test_who_asks_ahead_without_end_is_read_no_further() -> None:
    """Its answers are not read either: neither they nor what has been asked for may pile up here."""
    async with serve_hosts(A) as fleet, connected(fleet) as (_, writer):
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
        [connection] = (one for one in fleet.gateway._server._connections if one._queue)
        assert len(connection._queue) < 1_000, "what one slice of a read brought is all that waits"
        transport = connection._transport
        assert transport is not None
        assert transport.get_write_buffer_size() < 1 << 20


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_body_that_stops_is_given_up_in_the_clients_dialect(short: RunningGateway) -> None:
    native = await send_raw(short.port, post(b"{", length=100))
    assert native.startswith(b"HTTP/1.1 408 ")
    assert json.loads(native.partition(b"\r\n\r\n")[2]) == {"error": "the request body came too slowly"}
    openai = await send_raw(short.port, post(b"{", length=100, path="/v1/chat/completions"))
    assert b'"invalid_request_error"' in openai
    assert short.hosts["a"].counters.started == 0


async def test_a_body_may_take_long_as_long_as_it_moves(short: RunningGateway) -> None:
    """Longer than ``body_s``; at twice the slowest rate that is allowed."""
    padded = CHAT + b" " * (2_000 - len(CHAT))
    async with connected(short) as (reader, writer):
        writer.write(post(b"", length=len(padded)))
        for start in range(0, len(padded), 100):
            writer.write(padded[start : start + 100])
            if start + 100 < len(padded):
                await nothing_more(reader, 0.03)
        assert (await answer_of(reader))[0] == 200


async def test_a_body_that_trickles_is_given_up(short: RunningGateway) -> None:
    async with connected(short) as (reader, writer):
        writer.write(post(b"", length=5_000))
        answer = b""
        for _ in range(1_000):
            writer.write(b" ")
            try:
                answer = await asyncio.wait_for(reader.read(10_000), 0.03)
            except TimeoutError:
                continue
            break
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_says_it_is_too_large_is_not_read(short: RunningGateway) -> None:
    answer = await send_raw(short.port, post(b"{", length=1 << 40))
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_turns_out_too_large_is_not_read_further(short: RunningGateway) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await send_raw(short.port, head + chunk(b" " * 9_000) + chunk(b" " * 9_000))
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_is_still_sending_sees_the_refusal(short: RunningGateway) -> None:
    """And not a reset, which would say nothing."""
    answer = await send_raw(short.port, post(b" " * 200_000))
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "body", [b"zz\r\n", b"5\r\nab", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"-5\r\n", b"ffffffffffffffffff\r\n"]
)
async def test_a_body_that_breaks_its_own_framing_is_refused(short: RunningGateway, body: bytes) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await send_raw(short.port, head + body)
    assert re.match(rb"HTTP/1\.[01] 40[08] ", answer)


@pytest.mark.parametrize(
    ("encoding", "packed", "status"),
    [
        ("gzip", gzip.compress(CHAT, mtime=0), 200),
        ("GZIP ", gzip.compress(CHAT, mtime=0), 200),
        ("deflate", zlib.compress(CHAT), 200),
        ("deflate", zlib.compress(CHAT, wbits=-15), 200),
        ("identity", CHAT, 200),
        ("gzip", CHAT, 400),
        ("gzip", gzip.compress(CHAT, mtime=0)[:-9], 400),
        ("gzip", gzip.compress(b" " * 9_000_000, mtime=0), 413),
        ("br", CHAT, 415),
    ],
)
async def test_a_packed_body_is_unpacked_within_its_bound(
    short: RunningGateway, encoding: str, packed: bytes, status: int
) -> None:
    answer = await send_raw(short.port, post(packed, f"Content-Encoding: {encoding}", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


async def test_a_client_that_leaves_in_its_body_leaves_nothing_behind(short: RunningGateway) -> None:
    for _ in range(20):
        async with connected(short) as (_, writer):
            writer.write(post(b"{", length=5_000))
            await writer.drain()
    await wait_until(lambda: open_connections(short) == 0, "all connections are gone")
    assert short.mesh.request_counters.accepted == 0


async def test_who_asks_first_whether_to_send_is_told(short: RunningGateway) -> None:
    async with connected(short) as (reader, writer):
        writer.write(post(b"", "Expect: 100-continue", length=len(CHAT)))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(CHAT)
        assert (await answer_of(reader))[0] == 200
    refused = await send_raw(short.port, post(b"", "Expect: 100-continue", length=1 << 40))
    assert refused.startswith(b"HTTP/1.1 413 "), "before anything was sent"
    stranger = post(b"", "Expect: 100-continue", length=9).replace(b"localhost", b"evil.example")
    assert (await send_raw(short.port, stranger)).startswith(b"HTTP/1.1 403 ")
    assert (await send_raw(short.port, post(b"", "Expect: 200-ok", length=9))).startswith(b"HTTP/1.1 417 ")


# -- answers ---------------------------------------------------------------------------------------------------------


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


async def test_a_client_that_stops_reading_fills_no_memory_and_loses_its_place() -> None:
    backend = Endless()
    async with serve(backend) as scripted, serve_nodes((node("a", scripted.url),), bounds=SHORT) as fleet:
        async with connected(fleet) as (reader, writer):
            writer.write(post(CHAT.replace(b"false", b"true")))
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.wait_for(backend.gone.wait(), 20)
            # The rest is the buffers of two sockets, whose size the kernel chooses.
            assert backend.sent < 32 << 20
            await wait_until(lambda: fleet.mesh.request_counters.in_flight == 0, "its place is free")
        assert fleet.mesh.request_counters.cancelled == 1


@pytest.mark.slow
async def test_a_client_that_reads_slowly_is_served_to_the_end() -> None:
    total = 100 * 65536

    async def large(exchange: Exchange) -> None:
        if not exchange.head.startswith(b"POST"):
            await Endless()(exchange)
            return
        await exchange.send(chunked_head())
        line = b'{"message": {"content": "%s"}, "done": false}\n' % (b"x" * 65000)
        for _ in range(total // len(line)):
            await exchange.send(chunk(line))
        await exchange.send(chunk(b'{"done":true,"done_reason":"stop"}\n') + b"0\r\n\r\n")

    async with serve(large) as scripted, serve_nodes((node("a", scripted.url),), bounds=SHORT) as fleet:
        async with connected(fleet) as (reader, writer):
            writer.write(post(CHAT.replace(b"false", b"true"), "Connection: close"))
            size = 0
            while piece := await asyncio.wait_for(reader.read(1 << 17), 10):
                size += len(piece)
                await asyncio.sleep(0.02)  # a slow reader is what is tested
            assert size > total * 0.9
            assert piece == b""
        await wait_until(lambda: fleet.mesh.request_counters.served == 1, "it was served")


# -- connections -----------------------------------------------------------------------------------------------------


def open_connections(fleet: RunningGateway) -> int:
    return fleet.gateway._server.connection_count


async def test_past_the_bound_connections_are_refused_with_a_reason() -> None:
    async with serve_hosts(A, bounds=Bounds(max_connections=3)) as fleet:
        async with connected(fleet) as (_, one), connected(fleet) as (_, two), connected(fleet) as (_, three):
            for writer in (one, two, three):  # with a request under way: an idle one would make room
                writer.write(post(b"{", length=10))
            await wait_until(lambda: len(fleet.gateway._active) == 3, "all three are there")
            refused = await send_raw(fleet.port, GET)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 1\r\n" in refused
        await wait_until(lambda: open_connections(fleet) == 0, "they have left")
        told = (await fleet.client.get("/metrics")).text
        assert metric(told, "gpumesh_client_connections_refused_total") == 1
        assert metric(told, "gpumesh_client_connections") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_a_head_that_stops_is_given_up,
        test_a_head_that_trickles_is_given_up,
        test_a_second_head_has_the_same_bound,
        test_old_and_pipelined_clients_are_served,
        test_a_body_that_trickles_is_given_up,
        test_a_client_that_is_still_sending_sees_the_refusal,
        test_a_client_that_leaves_in_its_body_leaves_nothing_behind,
        test_who_asks_first_whether_to_send_is_told,
    ],
)
def test_on_the_loop_that_the_command_uses(check: Callable[[RunningGateway], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serve_hosts(A, bounds=SHORT) as fleet:
            await check(fleet)

    uvloop.run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_a_client_that_stops_reading_fills_no_memory_and_loses_its_place,
        test_a_client_that_reads_slowly_is_served_to_the_end,
        test_past_the_bound_connections_are_refused_with_a_reason,
    ],
)
def test_on_that_loop_too(check: Callable[[], Coroutine[None, None, None]]) -> None:
    uvloop.run(check())


# -- the server without a gateway, on either loop --------------------------------------------------------------------

both = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
Run = Callable[[Coroutine[Any, Any, None]], None]


class Bare:
    """``seen``: the requests that came to the handler."""

    def __init__(self, serving: Server, port: int) -> None:
        self.server = serving
        self.port = port
        self.seen: list[Request] = []


@asynccontextmanager
async def bare(handler: Handler, bounds: Bounds = SHORT, **more: Any) -> AsyncIterator[Bare]:
    async def noted(request: Request) -> Response | StreamingResponse:
        here.seen.append(request)
        return await handler(request)

    server = Server(noted, bounds, **more)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    here = Bare(server, listening.sockets[0].getsockname()[1])
    try:
        yield here
    finally:
        listening.close()
        await server.close()


async def fine(_: Request) -> Response:
    return Response(b"fine")


async def echo(request: Request) -> Response:
    try:
        return Response(await request.read_body())
    except BadRequest as error:
        return Response(error.message.encode(), status=error.status)


async def silent(port: int, *, receive: int = 4096) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client into whose socket little goes while it does not read."""
    ours = socket.socket()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    ours.setblocking(False)
    await asyncio.get_running_loop().sock_connect(ours, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=ours, limit=receive)
    return reader, writer


async def took(reader: asyncio.StreamReader, size: int, *, each: int, pause_s: float) -> int:
    """Reads slowly; how much there was until ``size`` or the end."""
    got = 0
    while got < size and (piece := await asyncio.wait_for(reader.read(each), 10)):
        got += len(piece)
        await asyncio.sleep(pause_s)  # a slow reader is what is tested
    return got


UPGRADE = "Connection: Upgrade\r\nUpgrade: h2c\r\n"


@both
def test_a_body_is_never_taken_for_a_request(run: Run) -> None:
    """Whatever its length is written like, and whatever is offered beside it."""

    async def main() -> None:
        async with bare(echo) as here:
            for blank, offer in itertools.product(("", " ", "\t \t"), ("", UPGRADE)):
                head = f"POST / HTTP/1.1\r\n{offer}Content-Length: {'0' * 5000}{len(GET)}{blank}\r\n\r\n"
                told = await send_raw(here.port, head.encode() + GET + b"POST / HTTP/1.1\r\nConnection: close\r\n\r\n")
                assert told.count(b"HTTP/1.1 200 OK") == 2
                assert GET in told
            assert {request.method for request in here.seen} == {"POST"}

    run(main())


@both
def test_a_body_that_no_handler_read_does_not_keep_the_next_request_unread(run: Run) -> None:
    """Its last bytes are those at which the client is no longer read."""

    async def until_it_is_there(request: Request) -> Response:
        await wait_until(lambda: request.body_received, "the whole body is there")
        return Response(b"fine")

    async def main() -> None:
        async with bare(until_it_is_there) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            for _ in range(3):
                writer.write(post(b"x" * (request_queue.MAX_BUFFERED_BODY_BYTES + 1)))
                assert await asyncio.wait_for(answer_of(reader), 10) == (200, b"fine")
            writer.close()

    run(main())


async def test_many_offers_ahead_are_all_passed_over() -> None:
    offer = f"GET / HTTP/1.1\r\n{UPGRADE}\r\n".encode()
    async with bare(fine) as here:
        told = await send_raw(here.port, offer * 2000 + b"GET / HTTP/1.0\r\n\r\n")
        assert told.count(b"HTTP/1.1 200 OK\r\n") == 2001


@pytest.mark.parametrize(
    "lines",
    [
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Host: a\r\nHost: b",
        "Host: a\r\nhost: a",
    ],
)
@pytest.mark.parametrize("offer", ["", UPGRADE])
async def test_what_others_could_take_for_something_else_is_refused(lines: str, offer: str) -> None:
    async with bare(echo) as here:
        told = await send_raw(here.port, f"POST / HTTP/1.1\r\n{offer}{lines}\r\n\r\n0\r\n\r\n".encode() + GET)
        assert told.startswith(b"HTTP/1.1 400 ")
        assert told.count(b"HTTP/1.1 ") == 1
        assert [request.method for request in here.seen if request.body_received] == []


async def test_chunks_from_an_old_client_are_the_last_that_is_heard() -> None:
    head = b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: Chunked\r\n\r\n"
    async with bare(echo) as here:
        told = await send_raw(here.port, head + chunk(b"abc") + b"0\r\n\r\n" + GET)
        assert told.endswith(b"abc")
        assert b"Connection: close\r\n" in told


async def test_blanks_around_a_value_are_none_of_it() -> None:
    async with bare(fine) as here:
        await send_raw(here.port, b"GET / HTTP/1.0\r\nX-One: \t a b \t \r\nX-Request-Id: \r\n\r\n")
        [request] = here.seen
        assert request.headers["x-one"] == "a b"
        assert request.id is None


async def test_a_node_is_asked_by_path_and_query_alone() -> None:
    async def known(exchange: Exchange) -> None:
        path = exchange.head.split()[1]
        kinds = {b"/api/version": {"version": "0.12.6"}, b"/api/tags": {"models": [{"name": MODEL}]}}
        await exchange.send(whole_response(json.dumps(kinds.get(path, {"done": True})).encode()))

    async with serve(known) as scripted, serve_nodes((node("a", scripted.url),)) as fleet:
        for target in ("http://evil.example/api/chat?x=1", "/api/chat?x=1#y/../z"):
            assert (await send_raw(fleet.port, post(CHAT, "Connection: close", path=target))).startswith(
                b"HTTP/1.1 200 "
            )
        asked = [one.head.split()[1] for one in scripted.requests if one.head.startswith(b"POST")]
        assert asked == [b"/api/chat?x=1"] * 2


@both
@pytest.mark.parametrize(
    "start", [b"0\r\nX: ", b"0\r\n", b"5;", b"0"], ids=["trailer", "trailers", "extension", "zeros"]
)
def test_what_frames_a_body_is_bounded(run: Run, start: bytes) -> None:
    """The parser keeps a trailer that does not end."""

    async def main() -> None:
        endless = {b"0\r\n": b"X: 1\r\n" * 200, b"0": b"0" * 1000}.get(start, b"a" * 1000)
        async with bare(echo, Bounds(linger_s=0.5)) as here:
            head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert (await send_raw(here.port, head + start + endless * 100)).startswith(b"HTTP/1.1 400 ")

    run(main())


async def test_line_ends_without_end_are_no_head() -> None:
    async with bare(fine, Bounds(linger_s=0.5)) as here:
        assert (await send_raw(here.port, b"\r\n" * 50_000)).startswith(b"HTTP/1.1 431 ")


async def test_a_bug_in_reading_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        return 1 / 0

    async with bare(fine, clock=broken) as here:
        with caplog.at_level(logging.ERROR):
            assert (await send_raw(here.port, GET)).startswith(b"HTTP/1.1 400 ")
    assert "ZeroDivisionError" in caplog.text


@both
def test_who_asks_ahead_does_not_keep_the_others_waiting(run: Run) -> None:
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
        async with bare(handler) as here:
            counting = asyncio.create_task(count())
            await send_raw(here.port, GET * 300 + b"GET / HTTP/1.0\r\n\r\n")
            counting.cancel()
        assert len(seen) == 301
        assert seen[-1] - seen[0] >= 250

    run(main())


@both
@pytest.mark.slow
def test_who_asks_ahead_is_not_told_that_it_is_slow_while_it_is_not_read(run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def handler(_: Request) -> Response:
            await go.wait()
            return Response(b"fine")

        async with bare(handler, Bounds(head_timeout_s=1.0)) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(GET * 30 + GET[:20])
            await nothing_more(reader, 1.3)
            go.set()
            for _ in range(30):
                assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
            writer.write(GET[20:])
            assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
            writer.close()

    run(main())


@both
@pytest.mark.parametrize("ahead", [GET * 100, post(b"", length=1 << 20) + b" " * (1 << 19)], ids=["requests", "a body"])
def test_who_leaves_while_it_is_not_read_is_noticed(run: Run, ahead: bytes) -> None:
    async def main() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(_: Request) -> Response:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

        async with bare(handler, Bounds()) as here:
            _, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(GET + ahead)
            await asyncio.wait_for(begun.wait(), 10)
            [connection] = here.server._connections
            await wait_until(lambda: connection._reader.paused, "it is not read")
            writer.transport.abort()
            await asyncio.wait_for(cancelled.wait(), 10)

    run(main())


@both
def test_what_a_handler_takes_for_a_body_is_not_the_clients_time(run: Run) -> None:
    async def main() -> None:
        first, go = asyncio.Event(), asyncio.Event()

        async def handler(request: Request) -> Response:
            size = 0
            async for piece in request.read_body_pieces():
                size += len(piece)
                first.set()
                await go.wait()
            return Response(b"%d" % size)

        async with bare(handler) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(post(b"a", length=2))
            await asyncio.wait_for(first.wait(), 10)
            await nothing_more(reader, SHORT.body_timeout_s * 2)  # a node that is slow to take it
            go.set()
            await nothing_more(reader, 0.05)
            writer.write(b"b")
            assert await asyncio.wait_for(answer_of(reader), 10) == (200, b"2")
            writer.close()

    run(main())


@both
def test_others_go_on_while_a_large_body_is_unpacked(run: Run) -> None:
    async def main() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        plain = random.Random(1).randbytes(1 << 20) * 19
        async with bare(echo, Bounds(max_body_bytes=50 << 20)) as here:
            packed = gzip.compress(plain, 1)
            assert await echo_of(here.port, packed) == (200, plain)
            assert (await echo_of(here.port, packed + b"rubbish"))[0] == 400
            assert (await echo_of(here.port, gzip.compress(b" " * (51 << 20))))[0] == 413
            text = b"Why is the sky blue, and how many clouds are in it? %d\n"
            many = b"".join(text % number for number in range(340_000))
            small = gzip.compress(many, 1)
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port, limit=1 << 26)
            counting = asyncio.create_task(count())
            writer.write(post(small, "Content-Encoding: gzip"))
            assert (await asyncio.wait_for(answer_of(reader), 30))[1] == many
            counting.cancel()
            writer.close()
        assert turns > len(many) >> 18, "a turn for each 256 KiB"

    run(main())


async def echo_of(port: int, packed: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    writer.write(post(packed, "Content-Encoding: gzip"))
    answer = await asyncio.wait_for(answer_of(reader), 30)
    writer.close()
    return answer


@both
def test_an_answer_says_what_becomes_of_its_connection(run: Run) -> None:
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

        async with bare(handler, Bounds()) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(post(b"", length=1))
            await asyncio.wait_for(begun.wait(), 10)
            writer.write(b"x")
            told = await asyncio.wait_for(reader.read(), 10)
            writer.close()
        assert b"Connection: close\r\n" in told
        assert told.endswith(b"0\r\n\r\n")

    run(main())


LARGE = b"x" * (8 << 20)


async def large(_: Request) -> Response:
    return Response(LARGE)


@both
@pytest.mark.slow
def test_a_large_answer_may_take_long_as_long_as_it_moves(run: Run) -> None:
    async def main() -> None:
        async with bare(large) as here:
            reader, writer = await silent(here.port, receive=1 << 16)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            began = asyncio.get_running_loop().time()
            assert await took(reader, 1 << 30, each=1 << 16, pause_s=0.02) > len(LARGE)
            assert asyncio.get_running_loop().time() - began > SHORT.write_timeout_s * 2
            writer.close()

            reader, writer = await silent(here.port)
            writer.write(GET)
            await wait_until(lambda: here.server.connection_count == 1, "it is there")
            await wait_until(lambda: here.server.connection_count == 0, "who takes nothing is gone")
            writer.close()

    run(main())


@both
@pytest.mark.parametrize("ask", [GET, b"GET / HTTP/1.0\r\n\r\n", post(b"", length=1)], ids=["keep", "close", "linger"])
def test_who_does_not_take_the_last_of_an_answer_is_not_kept(run: Run, ask: bytes) -> None:
    """So little that it does not count as a full buffer."""

    async def main() -> None:
        async def handler(request: Request) -> Response:
            assert isinstance(request._connection, connection.ClientConnection)
            transport = request._connection._transport
            assert transport is not None
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            return Response(b"x" * 60_000)

        async with bare(handler) as here:
            _, writer = await silent(here.port)
            writer.write(ask)
            await wait_until(lambda: len(here.seen) == 1, "it has been asked")
            await wait_until(lambda: here.server.connection_count == 0, "it is gone")
            writer.close()

    run(main())


@both
def test_what_has_been_answered_arrives_though_the_server_ends(run: Run) -> None:
    async def main() -> None:
        async with bare(large, Bounds(linger_s=20.0)) as here:
            reader, writer = await silent(here.port)
            other = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(GET)
            await wait_until(
                lambda: any(one.writer.unsent_bytes for one in here.server._connections), "it has been answered"
            )
            closing = asyncio.create_task(here.server.close())
            assert await asyncio.wait_for(other[0].read(), 10) == b"", "idle ones need not wait for it"
            assert not closing.done()
            assert await took(reader, 1 << 30, each=1 << 20, pause_s=0.0) > len(LARGE)
            await asyncio.wait_for(closing, 10)
            assert here.server.connection_count == 0
            writer.close()
            other[1].close()

    run(main())


@both
def test_an_end_does_not_wait_for_who_takes_nothing(run: Run) -> None:
    async def main() -> None:
        async with bare(large, Bounds(linger_s=0.1)) as here:
            _, writer = await silent(here.port)
            writer.write(GET)
            await wait_until(
                lambda: any(one.writer.unsent_bytes for one in here.server._connections), "it has been answered"
            )
            await asyncio.wait_for(here.server.close(), 10)
            assert here.server.connection_count == 0
            writer.close()

    run(main())


@both
def test_a_connection_that_is_to_end_ends_with_the_answer_it_has(run: Run) -> None:
    async def main() -> None:
        async with bare(large, Bounds()) as here:
            reader, writer = await silent(here.port)
            writer.write(GET)
            await wait_until(
                lambda: any(one.writer.unsent_bytes for one in here.server._connections), "it has been answered"
            )
            here.server.close_idle()
            assert await took(reader, 1 << 30, each=1 << 20, pause_s=0.0) > len(LARGE)
            writer.close()

    run(main())


@both
def test_a_part_is_never_taken_for_all(run: Run) -> None:
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

        async with bare(handler) as here:
            for path in ("/after", "/reply", "/unended"):
                told = await send_raw(here.port, GET.replace(b"/", path.encode(), 1))
                assert told.endswith(b"\r\n\r\n6\r\na part\r\n")
            assert (await send_raw(here.port, GET.replace(b"/", b"/before", 1))).startswith(b"HTTP/1.1 500 ")

    run(main())


@both
def test_a_stream_calls_back_when_its_client_has_taken_what_was_written_or_is_gone(run: Run) -> None:
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

        async with bare(handler, Bounds()) as here:
            reader, writer = await silent(here.port)
            writer.write(GET)
            await wait_until(lambda: bool(streams) and streams[0].backpressured, "the client takes no more")
            assert calls.empty()
            assert await took(reader, 1 << 20, each=1 << 20, pause_s=0.0) >= 1 << 20
            while calls.empty():
                await reader.read(1 << 20)
            assert calls.get_nowait() is False
            writer.transport.abort()
            await asyncio.wait_for(calls.get(), 10)
            with pytest.raises(ConnectionResetError):
                streams[0].write(b"x")

    run(main())


@both
def test_a_client_past_the_bound_that_is_still_sending_sees_the_refusal(run: Run) -> None:
    async def main() -> None:
        async with bare(fine, Bounds(max_connections=0)) as here:
            for _ in range(20):
                assert (await send_raw(here.port, post(b" " * 2_000_000))).startswith(b"HTTP/1.1 503 ")
            held = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(server.MAX_LINGERING + 10)]
            await wait_until(lambda: here.server.refused_connections == 20 + len(held), "all were turned away")
            assert len(here.server._lingering) <= server.MAX_LINGERING
            await here.server.close()
            assert not here.server._lingering
            for reader, writer in held:
                assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 503 ")
                writer.close()

    run(main())


@both
def test_a_client_that_is_still_sending_much_sees_the_refusal(run: Run) -> None:
    async def main() -> None:
        async def handler(_: Request) -> Response:
            return Response(b"no", status=413)

        async with bare(handler, Bounds(linger_s=10.0)) as here:
            for _ in range(10):
                assert (await send_raw(here.port, post(b" " * (10 << 20)))).startswith(b"HTTP/1.1 413 ")

    run(main())


@both
def test_a_client_that_goes_with_the_last_byte_is_no_error(run: Run, caplog: pytest.LogCaptureFixture) -> None:
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

        async with bare(handler) as here:
            await asyncio.to_thread(client.connect, ("127.0.0.1", here.port))
            client.sendall(post(b"", length=1))
            await wait_until(lambda: len(here.seen) == 1, "it has been asked")
            await wait_until(lambda: here.server.connection_count == 0, "it is gone")

    with caplog.at_level(logging.INFO):
        run(main())
    assert caplog.text == ""


@both
def test_nothing_of_a_connection_waits_for_the_garbage_collector(run: Run) -> None:
    async def main() -> None:
        alive: weakref.WeakSet[connection.ClientConnection] = weakref.WeakSet()
        async with bare(echo) as here:
            for data in (GET, GET * 3, post(b"abc"), post(b"", length=9), GET[:9], b"zyzzyva\r\n", GET * 100):
                _, writer = await asyncio.open_connection("127.0.0.1", here.port)
                writer.write(data)
                await wait_until(lambda: here.server.connection_count == 1, "it is there")
                await asyncio.sleep(0.01)
                alive.update(here.server._connections)
                assert alive
                writer.transport.abort()
                here.seen.clear()
                await wait_until(lambda: here.server.connection_count == 0, "it is gone")
                here.seen.clear()
                await wait_until(lambda: not alive, f"nothing is left after {data[:20]!r}")

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()
