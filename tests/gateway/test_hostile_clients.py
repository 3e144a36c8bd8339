"""Whatever one client sends, the streams of other clients are not delayed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tests.gateway.fleet import MODEL, RunningGateway, quick_host, serve_hosts
from tests.hostile_peers import STALL_S, HostileClients, repeat_bytes, track_longest_loop_turn
from tests.tunnels.polling import wait_until

POST = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

NEVER_WHOLE = {
    "a target": (b"GET /", b"a"),
    "the value of a header": (POST + b"X-Long: ", b"a"),
    "the name of a header": (POST, b"a"),
    "headers": (POST, b"a: b\r\n"),
    "empty lines": (b"", b"\r\n"),
    "a chunk's extension": (CHUNKED + b"1;", b"a"),
    "a chunk's size": (CHUNKED, b"0"),
    "the value of a trailer": (CHUNKED + b"0\r\nX-Long: ", b"a"),
    "the name of a trailer": (CHUNKED + b"0\r\n", b"a"),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n"),
}
SMALL_PARTS = {
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n"),
    "chunks of two bytes": (CHUNKED, b"2\r\nxy\r\n"),
    "requests": (b"", GET),
    "requests with a body": (b"", GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\nx")),
}

Run = Callable[[Coroutine[Any, Any, None]], None]
both = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


async def honest_stream(fleet: RunningGateway) -> bool:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 60}}
    return b'"done":true' in (await fleet.client.post("/api/chat", json=body)).content


@pytest.mark.parametrize("part", NEVER_WHOLE)
async def test_a_part_that_never_ends_is_refused_and_does_not_delay_other_streams(part: str) -> None:
    start, unit = NEVER_WHOLE[part]
    async with serve_hosts(quick_host("a", tokens_per_s=100.0)) as fleet:
        honest = asyncio.create_task(honest_stream(fleet))
        async with track_longest_loop_turn() as turn:
            with HostileClients(fleet.port, lambda: repeat_bytes(start, unit, most=4 << 20)) as clients:
                await wait_until(lambda: clients.all_ended, "each connection ends")
            assert await honest
            assert turn() < STALL_S
        assert [answer[:10] for answer in clients.answers] == [b"HTTP/1.1 4"]


@both
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("part", SMALL_PARTS)
def test_many_small_parts_do_not_delay_other_streams(part: str, count: int, run: Run) -> None:
    start, unit = SMALL_PARTS[part]

    async def check() -> None:
        async with serve_hosts(quick_host("a", tokens_per_s=100.0)) as fleet:
            async with track_longest_loop_turn() as turn:
                with HostileClients(fleet.port, lambda: repeat_bytes(start, unit, most=2 << 20), count) as clients:
                    assert await honest_stream(fleet)
                    assert turn() < STALL_S
                    assert clients.sent > 100 << 10
            assert json.loads((await fleet.chat()).content)["done"]

    run(check())
