"""The heads of requests: how long they may take, how large they may be, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from gpumesh.gateway.http.bounds import Bounds
from tests.gateway.fleet import MODEL, A, RunningGateway, node, send_raw, serve_hosts, serve_nodes
from tests.gateway.http.raw_clients import (
    CHAT,
    GET,
    SHORT,
    UPGRADE,
    Run,
    answer_fine,
    connect,
    echo,
    expect_silence,
    on_both_loops,
    post,
    read_answer,
    run_server,
)
from tests.mesh.servers import Exchange, chunk, serve, whole_response


async def test_an_incomplete_head_times_out(short: RunningGateway) -> None:
    answer = await send_raw(short.port, GET[:-2])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close\r\n" in answer


async def test_a_trickling_head_times_out(short: RunningGateway) -> None:
    async with connect(short) as (reader, writer):
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


async def test_a_second_head_times_out_as_the_first(short: RunningGateway) -> None:
    async with connect(short) as (reader, writer):
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200
        writer.write(GET[:20])
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
async def test_a_connection_may_be_idle_between_two_requests(short: RunningGateway) -> None:
    async with connect(short) as (reader, writer):
        for _ in range(2):
            writer.write(GET)
            assert (await read_answer(reader))[0] == 200
            await expect_silence(reader, SHORT.head_timeout_s * 1.7)
        assert await asyncio.wait_for(reader.read(), 10) == b"", "then the connection is closed without a word"


@pytest.mark.slow
async def test_a_head_that_begins_before_the_idle_timeout_is_read() -> None:
    async with (
        serve_hosts(A, bounds=Bounds(head_timeout_s=5.0, keepalive_s=0.5)) as fleet,
        connect(fleet) as (reader, writer),
    ):
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200
        writer.write(GET[:10])
        await expect_silence(reader, 1.0)
        writer.write(GET[10:])
        assert (await read_answer(reader))[0] == 200
        assert await asyncio.wait_for(reader.read(), 10) == b""


@pytest.mark.slow
async def test_a_connection_without_any_request_is_closed(short: RunningGateway) -> None:
    async with connect(short) as (reader, _):
        assert await asyncio.wait_for(reader.read(), 10) == b""


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40_000, 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: 1\r\n" % number for number in range(200)), 431),
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
async def test_what_is_no_request_is_refused_and_not_quoted(short: RunningGateway, head: bytes, status: int) -> None:
    answer = await send_raw(short.port, head + b"\r\n")
    assert re.match(rb"HTTP/1\.[01] %d " % status, answer), "1.0: what came may be no 1.1 at all"
    words = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "zyzzyva" not in words
    assert "aaaa" not in words


async def test_an_upgrade_offer_is_passed_over(short: RunningGateway) -> None:
    """JDK's HTTP client offers HTTP/2 in the first request of each connection, with a body behind it."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + chunk(CHAT[:20]) + chunk(CHAT[20:]) + b"0\r\n\r\n"
    offered = post(CHAT, *offer)
    chunked = offered.partition(b"\r\n\r\n")[0].replace(b"Content-Length: %d\r\n" % len(CHAT), b"") + b"\r\n" + chunks
    get = GET[:-2] + "\r\n".join([*offer, "", ""]).encode()
    async with connect(short) as (reader, writer):
        for data in (offered, get, chunked, get + get + offered):
            writer.write(data)
            for _ in range(data.count(b"Upgrade: h2c")):
                assert (await asyncio.wait_for(read_answer(reader), 10))[0] == 200
        for byte in offered:  # and wherever the network cuts it
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(read_answer(reader), 10))[0] == 200
    assert (await send_raw(short.port, b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n\x16\x03")).startswith(
        b"HTTP/1.1 404 "
    )


async def test_an_endless_head_is_refused() -> None:
    async with serve_hosts(A) as fleet, connect(fleet) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(40):
            writer.write(b"a" * 1000)
            await writer.drain()
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 431 ")


@on_both_loops
def test_a_body_is_never_taken_for_a_request(run: Run) -> None:
    """Whatever its length is written like, and whatever is offered beside it."""

    async def main() -> None:
        async with run_server(echo) as running:
            for blank, offer in itertools.product(("", " ", "\t \t"), ("", UPGRADE)):
                head = f"POST / HTTP/1.1\r\n{offer}Content-Length: {'0' * 5000}{len(GET)}{blank}\r\n\r\n"
                received = await send_raw(
                    running.port, head.encode() + GET + b"POST / HTTP/1.1\r\nConnection: close\r\n\r\n"
                )
                assert received.count(b"HTTP/1.1 200 OK") == 2
                assert GET in received
            assert {request.method for request in running.seen} == {"POST"}

    run(main())


async def test_many_pipelined_upgrade_offers_are_passed_over() -> None:
    offer = f"GET / HTTP/1.1\r\n{UPGRADE}\r\n".encode()
    async with run_server(answer_fine) as running:
        received = await send_raw(running.port, offer * 2000 + b"GET / HTTP/1.0\r\n\r\n")
        assert received.count(b"HTTP/1.1 200 OK\r\n") == 2001


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
async def test_an_ambiguous_head_is_refused(lines: str, offer: str) -> None:
    async with run_server(echo) as running:
        received = await send_raw(running.port, f"POST / HTTP/1.1\r\n{offer}{lines}\r\n\r\n0\r\n\r\n".encode() + GET)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert received.count(b"HTTP/1.1 ") == 1
        assert [request.method for request in running.seen if request.body_received] == []


async def test_blanks_around_a_header_value_are_removed() -> None:
    async with run_server(answer_fine) as running:
        await send_raw(running.port, b"GET / HTTP/1.0\r\nX-One: \t a b \t \r\nX-Request-Id: \r\n\r\n")
        [request] = running.seen
        assert request.headers["x-one"] == "a b"
        assert request.id is None


async def test_a_node_gets_path_and_query_of_the_target_alone() -> None:
    async def known(exchange: Exchange) -> None:
        path = exchange.head.split()[1]
        kinds = {b"/api/version": {"version": "0.12.6"}, b"/api/tags": {"models": [{"name": MODEL}]}}
        await exchange.send(whole_response(json.dumps(kinds.get(path, {"done": True})).encode()))

    async with serve(known) as scripted, serve_nodes((node("a", scripted.url),)) as fleet:
        for target in ("http://evil.example/api/chat?x=1", "/api/chat?x=1#y/../z"):
            assert (await send_raw(fleet.port, post(CHAT, "Connection: close", path=target))).startswith(
                b"HTTP/1.1 200 "
            )
        asked = [exchange.head.split()[1] for exchange in scripted.requests if exchange.head.startswith(b"POST")]
        assert asked == [b"/api/chat?x=1"] * 2


async def test_endless_blank_lines_are_refused() -> None:
    async with run_server(answer_fine, Bounds(linger_s=0.5)) as running:
        assert (await send_raw(running.port, b"\r\n" * 50_000)).startswith(b"HTTP/1.1 431 ")


async def test_a_bug_while_reading_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        return 1 / 0

    async with run_server(answer_fine, clock=broken) as running:
        with caplog.at_level(logging.ERROR):
            assert (await send_raw(running.port, GET)).startswith(b"HTTP/1.1 400 ")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [test_an_incomplete_head_times_out, test_a_trickling_head_times_out, test_a_second_head_times_out_as_the_first],
)
def test_on_uvloop(check: Callable[[RunningGateway], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serve_hosts(A, bounds=SHORT) as fleet:
            await check(fleet)

    uvloop.run(main())
