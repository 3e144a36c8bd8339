"""A probe's client against servers that send what costs more than its bytes."""

from __future__ import annotations

import asyncio
import gzip

import httpx
import pytest

from gpumesh.errors import ProbeError
from gpumesh.probes.bounded_get import BODY_LIMIT, get_bounded
from gpumesh.probes.http_client import make_http_client
from tests.hostile_peers import (
    CHUNKED,
    HEAD,
    STALL_S,
    UNFINISHED_ANSWERS,
    HostileServer,
    json_answer,
    repeat_bytes,
    track_longest_loop_turn,
)

SMALL_PARTS = {
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n"),
    "chunks with an extension": (CHUNKED, b"1;a\r\nx\r\n"),
    "a head of many fields": (HEAD + b"a:\r\n" * 24_000 + b"\r\n", b"x"),
}


async def warm_client(client: httpx.AsyncClient) -> None:
    """What is imported at the first request is no cost of an answer."""
    with HostileServer(lambda _: iter([json_answer({})])) as server:
        assert (await client.get(server.url)).json() == {}


@pytest.mark.parametrize("part", [*UNFINISHED_ANSWERS, *SMALL_PARTS])
async def test_other_tasks_run_whatever_a_server_sends(part: str) -> None:
    start, unit = {**UNFINISHED_ANSWERS, **SMALL_PARTS}[part]
    with HostileServer(lambda _: repeat_bytes(start, unit)) as server:
        async with make_http_client() as client:
            await warm_client(client)
            async with track_longest_loop_turn() as turn:
                with pytest.raises((ProbeError, TimeoutError)):
                    async with asyncio.timeout(1.5):
                        await get_bounded(client, server.url + "/api/tags", {}, {})
                assert turn() < STALL_S
        assert server.sent < 32 << 20, "the buffers of some sockets, not what would have come"


async def test_a_body_has_a_bound_whatever_its_head_says() -> None:
    start = HEAD + b"Content-Length: 1000000000000000000\r\n\r\n"
    with HostileServer(lambda _: repeat_bytes(start, b"x")) as server:
        async with make_http_client() as client:
            with pytest.raises(ProbeError, match="more than 8 MiB"):
                await get_bounded(client, server.url + "/api/tags", {}, {})
        assert server.sent < BODY_LIMIT + (16 << 20)


async def test_compressed_bodies_are_not_unpacked() -> None:
    bomb = gzip.compress(b"x" * (64 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    heads: list[bytes] = []

    class Server(HostileServer):
        def on_request(self, head: bytes) -> None:
            heads.append(head)

    with Server(lambda _: iter([head + bomb])) as server:
        async with make_http_client() as client:
            assert await get_bounded(client, server.url + "/api/tags", {}, {}) == (200, bomb)
    assert b"accept-encoding: identity\r\n" in heads[0].lower() + b"\r\n"


async def test_a_connection_is_used_again_and_each_head_has_its_own_bound() -> None:
    field = b"X-Long: " + b"a" * 20_000 + b"\r\n"
    answer = b"HTTP/1.1 200 OK\r\n" + field + b"Content-Length: 2\r\n\r\n{}"
    with HostileServer(lambda _: iter([answer])) as server:
        async with make_http_client() as client:
            for _ in range(4):
                assert await get_bounded(client, server.url, {}, {}) == (200, b"{}")
        assert server.connections == 1
