"""The bounds that a server needs in front of hardware that costs money, on raw sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import resource
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
import uvloop

from gpumesh.gateway import server
from gpumesh.gateway.server import Bounds
from tests.gateway.fleet import MODEL, A, Running, metric, node, raw, running, serving
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole
from tests.tunnels.polling import until

SHORT = Bounds(head_s=0.3, body_s=0.3, body_rate=1000, write_s=0.5, keepalive_s=1.0, linger_s=0.2, body_bytes=10_000)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": False}).encode()


def post(body: bytes, *more: str, length: int | None = None, path: str = "/api/chat") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode() + body


@pytest.fixture
async def short() -> AsyncIterator[Running]:
    async with running(A, bounds=SHORT) as fleet:
        yield fleet


@asynccontextmanager
async def connected(fleet: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
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


async def test_a_head_that_stops_is_given_up(short: Running) -> None:
    answer = await raw(short.port, GET[:-2])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close\r\n" in answer


async def test_a_head_that_trickles_is_given_up(short: Running) -> None:
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


async def test_a_second_head_has_the_same_bound(short: Running) -> None:
    async with connected(short) as (reader, writer):
        writer.write(GET)
        assert (await answer_of(reader))[0] == 200
        writer.write(GET[:20])
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
async def test_who_waits_between_two_requests_is_left_alone_for_a_while(short: Running) -> None:
    async with connected(short) as (reader, writer):
        for _ in range(2):
            writer.write(GET)
            assert (await answer_of(reader))[0] == 200
            await nothing_more(reader, SHORT.head_s * 1.7)
        assert await asyncio.wait_for(reader.read(), 10) == b"", "then the connection is closed without a word"


@pytest.mark.slow
async def test_a_head_that_begins_as_the_connection_would_be_closed_is_heard() -> None:
    async with running(A, bounds=Bounds(head_s=5.0, keepalive_s=0.5)) as fleet, connected(fleet) as (reader, writer):
        writer.write(GET)
        assert (await answer_of(reader))[0] == 200
        writer.write(GET[:10])
        await nothing_more(reader, 1.0)
        writer.write(GET[10:])
        assert (await answer_of(reader))[0] == 200
        assert await asyncio.wait_for(reader.read(), 10) == b""


@pytest.mark.slow
async def test_a_connection_that_never_says_anything_is_closed(short: Running) -> None:
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
async def test_what_is_no_request_is_refused_without_its_words(short: Running, head: bytes, status: int) -> None:
    answer = await raw(short.port, head + b"\r\n")
    assert re.match(rb"HTTP/1\.[01] %d " % status, answer), "1.0: what was said may be no 1.1 at all"
    words = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "zyzzyva" not in words
    assert "aaaa" not in words


async def test_old_and_pipelined_clients_are_served(short: Running) -> None:
    old = await raw(short.port, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert old.endswith(b"Ollama is running")
    both = await raw(short.port, GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert both.count(b"Ollama is running") == 2


async def test_an_offer_of_another_protocol_is_passed_over(short: Running) -> None:
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
    assert (await raw(short.port, b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n\x16\x03")).startswith(
        b"HTTP/1.1 404 "
    )


async def test_much_that_is_asked_ahead_is_no_large_head(short: Running) -> None:
    """However the network cuts it: here in the middle of a head, behind more bytes than a head may have."""
    ahead = GET * (SHORT.head_bytes // len(GET) + 10)
    async with connected(short) as (reader, writer):
        writer.write(ahead + GET[:20])
        for _ in range(ahead.count(b"GET")):
            assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
        writer.write(GET[20:])
        assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200


async def test_a_head_that_never_gets_whole_is_bounded() -> None:
    async with running(A) as fleet, connected(fleet) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(40):
            writer.write(b"a" * 1000)
            await writer.drain()
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 431 ")


async def test_who_asks_ahead_without_end_is_read_no_further() -> None:
    """Its answers are not read either: neither they nor what has been asked for may pile up here."""
    async with running(A) as fleet, connected(fleet) as (_, writer):
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
        [connection] = (one for one in fleet.gateway._server._connections if one._waiting)
        assert len(connection._waiting) < 10_000, "what one read brought is all that waits"
        transport = connection._transport
        assert transport is not None
        assert transport.get_write_buffer_size() < 1 << 20


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_body_that_stops_is_given_up_in_the_clients_dialect(short: Running) -> None:
    native = await raw(short.port, post(b"{", length=100))
    assert native.startswith(b"HTTP/1.1 408 ")
    assert json.loads(native.partition(b"\r\n\r\n")[2]) == {"error": "the request body came too slowly"}
    openai = await raw(short.port, post(b"{", length=100, path="/v1/chat/completions"))
    assert b'"invalid_request_error"' in openai
    assert short.hosts["a"].counters.started == 0


async def test_a_body_may_take_long_as_long_as_it_moves(short: Running) -> None:
    """Longer than ``body_s``; at twice the slowest rate that is allowed."""
    padded = CHAT + b" " * (2_000 - len(CHAT))
    async with connected(short) as (reader, writer):
        writer.write(post(b"", length=len(padded)))
        for start in range(0, len(padded), 100):
            writer.write(padded[start : start + 100])
            if start + 100 < len(padded):
                await nothing_more(reader, 0.03)
        assert (await answer_of(reader))[0] == 200


async def test_a_body_that_trickles_is_given_up(short: Running) -> None:
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


async def test_a_body_that_says_it_is_too_large_is_not_read(short: Running) -> None:
    answer = await raw(short.port, post(b"{", length=1 << 40))
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_turns_out_too_large_is_not_read_further(short: Running) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await raw(short.port, head + chunk(b" " * 9_000) + chunk(b" " * 9_000))
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_is_still_sending_sees_the_refusal(short: Running) -> None:
    """And not a reset, which would say nothing."""
    answer = await raw(short.port, post(b" " * 200_000))
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "body", [b"zz\r\n", b"5\r\nab", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"-5\r\n", b"ffffffffffffffffff\r\n"]
)
async def test_a_body_that_breaks_its_own_framing_is_refused(short: Running, body: bytes) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await raw(short.port, head + body)
    assert re.match(rb"HTTP/1\.[01] 40[08] ", answer)


@pytest.mark.parametrize(
    ("encoding", "packed", "status"),
    [
        ("gzip", gzip.compress(CHAT), 200),
        ("GZIP ", gzip.compress(CHAT), 200),
        ("deflate", zlib.compress(CHAT), 200),
        ("deflate", zlib.compress(CHAT, wbits=-15), 200),
        ("identity", CHAT, 200),
        ("gzip", CHAT, 400),
        ("gzip", gzip.compress(CHAT)[:-9], 400),
        ("gzip", gzip.compress(b" " * 9_000_000), 413),
        ("br", CHAT, 415),
    ],
)
async def test_a_packed_body_is_unpacked_within_its_bound(
    short: Running, encoding: str, packed: bytes, status: int
) -> None:
    answer = await raw(short.port, post(packed, f"Content-Encoding: {encoding}", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


async def test_a_client_that_leaves_in_its_body_leaves_nothing_behind(short: Running) -> None:
    for _ in range(20):
        async with connected(short) as (_, writer):
            writer.write(post(b"{", length=5_000))
            await writer.drain()
    await until(lambda: open_connections(short) == 0, "all connections are gone")
    assert short.mesh.books.accepted == 0


async def test_who_asks_first_whether_to_send_is_told(short: Running) -> None:
    async with connected(short) as (reader, writer):
        writer.write(post(b"", "Expect: 100-continue", length=len(CHAT)))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(CHAT)
        assert (await answer_of(reader))[0] == 200
    refused = await raw(short.port, post(b"", "Expect: 100-continue", length=1 << 40))
    assert refused.startswith(b"HTTP/1.1 413 "), "before anything was sent"
    stranger = post(b"", "Expect: 100-continue", length=9).replace(b"localhost", b"evil.example")
    assert (await raw(short.port, stranger)).startswith(b"HTTP/1.1 403 ")
    assert (await raw(short.port, post(b"", "Expect: 200-ok", length=9))).startswith(b"HTTP/1.1 417 ")


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
            await exchange.send(whole(json.dumps(known).encode()))
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
    async with serve(backend) as scripted, serving((node("a", scripted.url),), bounds=SHORT) as fleet:
        async with connected(fleet) as (reader, writer):
            writer.write(post(CHAT.replace(b"false", b"true")))
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.wait_for(backend.gone.wait(), 20)
            # The rest is the buffers of two sockets, whose size the kernel chooses.
            assert backend.sent < 32 << 20
            await until(lambda: fleet.mesh.books.in_flight == 0, "its place is free")
        assert fleet.mesh.books.cancelled == 1


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

    async with serve(large) as scripted, serving((node("a", scripted.url),), bounds=SHORT) as fleet:
        async with connected(fleet) as (reader, writer):
            writer.write(post(CHAT.replace(b"false", b"true"), "Connection: close"))
            size = 0
            while piece := await asyncio.wait_for(reader.read(1 << 17), 10):
                size += len(piece)
                await asyncio.sleep(0.02)  # a slow reader is what is tested
            assert size > total * 0.9
            assert piece == b""
        await until(lambda: fleet.mesh.books.served == 1, "it was served")


# -- connections -----------------------------------------------------------------------------------------------------


def open_connections(fleet: Running) -> int:
    return fleet.gateway._server.connections


async def test_past_the_bound_connections_are_refused_with_a_reason() -> None:
    async with running(A, bounds=Bounds(connections=3)) as fleet, connected(fleet), connected(fleet):
        assert (await fleet.client.get("/")).status_code == 200
        await until(lambda: open_connections(fleet) == 3, "all three are there")
        refused = await raw(fleet.port, GET)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1\r\n" in refused
        told = (await fleet.client.get("/metrics")).text
        assert metric(told, "gpumesh_client_connections_refused_total") == 1
        assert metric(told, "gpumesh_client_connections") == 3


def test_as_many_connections_as_the_process_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, allowed in ((1024, 384), (65536, 32640), (resource.RLIM_INFINITY, 1 << 20), (100, 64)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert server.connections_allowed() == allowed


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
def test_on_the_loop_that_the_command_uses(check: Callable[[Running], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(A, bounds=SHORT) as fleet:
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
