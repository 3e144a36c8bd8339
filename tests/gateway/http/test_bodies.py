"""The bodies of requests: time, size, framing and compression."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import zlib
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from tests.gateway.fleet import A, RunningGateway, send_raw, serve_hosts
from tests.gateway.http.raw_clients import (
    CHAT,
    GET,
    SHORT,
    Run,
    connect,
    count_connections,
    echo,
    expect_silence,
    on_both_loops,
    post,
    read_answer,
    run_server,
)
from tests.mesh.servers import chunk
from tests.tunnels.polling import wait_until


@pytest.mark.slow
async def test_an_incomplete_body_times_out_in_the_clients_dialect(short: RunningGateway) -> None:
    native = await send_raw(short.port, post(b"{", length=100))
    assert native.startswith(b"HTTP/1.1 408 ")
    assert json.loads(native.partition(b"\r\n\r\n")[2]) == {"error": "the request body came too slowly"}
    openai = await send_raw(short.port, post(b"{", length=100, path="/v1/chat/completions"))
    assert b'"invalid_request_error"' in openai
    assert short.hosts["a"].counters.started == 0


async def test_a_slow_body_is_read_while_it_moves(short: RunningGateway) -> None:
    """Longer than ``body_s``; at twice the slowest rate that is allowed."""
    padded = CHAT + b" " * (2_000 - len(CHAT))
    async with connect(short) as (reader, writer):
        writer.write(post(b"", length=len(padded)))
        for start in range(0, len(padded), 100):
            writer.write(padded[start : start + 100])
            if start + 100 < len(padded):
                await expect_silence(reader, 0.03)
        assert (await read_answer(reader))[0] == 200


async def test_a_trickling_body_times_out(short: RunningGateway) -> None:
    async with connect(short) as (reader, writer):
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


async def test_a_body_announced_as_too_large_is_not_read(short: RunningGateway) -> None:
    answer = await send_raw(short.port, post(b"{", length=1 << 40))
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_chunked_body_that_becomes_too_large_is_refused(short: RunningGateway) -> None:
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
async def test_a_body_with_broken_framing_is_refused(short: RunningGateway, body: bytes) -> None:
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
async def test_a_compressed_body_is_unpacked_within_its_bound(
    short: RunningGateway, encoding: str, packed: bytes, status: int
) -> None:
    answer = await send_raw(short.port, post(packed, f"Content-Encoding: {encoding}", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


async def test_a_client_that_leaves_within_its_body_leaves_nothing_behind(short: RunningGateway) -> None:
    for _ in range(20):
        async with connect(short) as (_, writer):
            writer.write(post(b"{", length=5_000))
            await writer.drain()
    await wait_until(lambda: count_connections(short) == 0, "all connections are gone")
    assert short.mesh.request_counters.accepted == 0


async def test_an_expectation_is_answered(short: RunningGateway) -> None:
    async with connect(short) as (reader, writer):
        writer.write(post(b"", "Expect: 100-continue", length=len(CHAT)))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(CHAT)
        assert (await read_answer(reader))[0] == 200
    refused = await send_raw(short.port, post(b"", "Expect: 100-continue", length=1 << 40))
    assert refused.startswith(b"HTTP/1.1 413 "), "before anything was sent"
    stranger = post(b"", "Expect: 100-continue", length=9).replace(b"localhost", b"evil.example")
    assert (await send_raw(short.port, stranger)).startswith(b"HTTP/1.1 403 ")
    assert (await send_raw(short.port, post(b"", "Expect: 200-ok", length=9))).startswith(b"HTTP/1.1 417 ")


async def test_a_connection_ends_after_a_chunked_http10_body() -> None:
    head = b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: Chunked\r\n\r\n"
    async with run_server(echo) as running:
        received = await send_raw(running.port, head + chunk(b"abc") + b"0\r\n\r\n" + GET)
        assert received.endswith(b"abc")
        assert b"Connection: close\r\n" in received


@on_both_loops
@pytest.mark.parametrize(
    "start", [b"0\r\nX: ", b"0\r\n", b"5;", b"0"], ids=["trailer", "trailers", "extension", "zeros"]
)
def test_endless_framing_is_refused(run: Run, start: bytes) -> None:
    """The parser keeps a trailer that does not end."""

    async def main() -> None:
        endless = {b"0\r\n": b"X: 1\r\n" * 200, b"0": b"0" * 1000}.get(start, b"a" * 1000)
        async with run_server(echo, Bounds(linger_s=0.5)) as running:
            head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert (await send_raw(running.port, head + start + endless * 100)).startswith(b"HTTP/1.1 400 ")

    run(main())


@on_both_loops
def test_the_body_timeout_does_not_count_the_handlers_time(run: Run) -> None:
    async def main() -> None:
        first, go = asyncio.Event(), asyncio.Event()

        async def handler(request: Request) -> Response:
            size = 0
            async for piece in request.read_body_pieces():
                size += len(piece)
                first.set()
                await go.wait()
            return Response(b"%d" % size)

        async with run_server(handler) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(post(b"a", length=2))
            await asyncio.wait_for(first.wait(), 10)
            await expect_silence(reader, SHORT.body_timeout_s * 2)  # a node that is slow to take it
            go.set()
            await expect_silence(reader, 0.05)
            writer.write(b"b")
            assert await asyncio.wait_for(read_answer(reader), 10) == (200, b"2")
            writer.close()

    run(main())


@on_both_loops
def test_unpacking_a_large_body_does_not_delay_others(run: Run) -> None:
    async def main() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        plain = random.Random(1).randbytes(1 << 20) * 19
        async with run_server(echo, Bounds(max_body_bytes=50 << 20)) as running:
            packed = gzip.compress(plain, 1)
            assert await send_packed(running.port, packed) == (200, plain)
            assert (await send_packed(running.port, packed + b"rubbish"))[0] == 400
            assert (await send_packed(running.port, gzip.compress(b" " * (51 << 20))))[0] == 413
            text = b"Why is the sky blue, and how many clouds are in it? %d\n"
            many = b"".join(text % number for number in range(340_000))
            small = gzip.compress(many, 1)
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=1 << 26)
            counting = asyncio.create_task(count())
            writer.write(post(small, "Content-Encoding: gzip"))
            assert (await asyncio.wait_for(read_answer(reader), 30))[1] == many
            counting.cancel()
            writer.close()
        assert turns > len(many) >> 18, "a turn for each 256 KiB"

    run(main())


async def send_packed(port: int, packed: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    writer.write(post(packed, "Content-Encoding: gzip"))
    answer = await asyncio.wait_for(read_answer(reader), 30)
    writer.close()
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_a_trickling_body_times_out,
        test_a_client_that_is_still_sending_sees_the_refusal,
        test_a_client_that_leaves_within_its_body_leaves_nothing_behind,
        test_an_expectation_is_answered,
    ],
)
def test_on_uvloop(check: Callable[[RunningGateway], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serve_hosts(A, bounds=SHORT) as fleet:
            await check(fleet)

    uvloop.run(main())
