"""When Redis counts as slow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpumesh.coordination.timing import COUNTED_ANSWERS, SLOW_S, AnswerTimes
from tests.coordination.redis_server import gateway, redis_server
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until


def test_only_when_all_of_the_last_answers_were_slow() -> None:
    times = AnswerTimes()
    for _ in range(COUNTED_ANSWERS - 1):
        times.note(0.05)
    assert times.least_s is None
    times.note(0.001)
    assert times.least_s == 0.001
    for _ in range(COUNTED_ANSWERS):
        times.note(0.05)
    assert times.least_s == 0.05


@asynccontextmanager
async def slow_way(path: Path, to: Path, delay_s: float) -> AsyncIterator[str]:
    """A socket at ``path`` from which what the server at ``to`` answers comes ``delay_s`` later. Yields its URL."""

    ended: list[asyncio.Event] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(delay_s)
                writer.write(data)
            writer.close()
            await writer.wait_closed()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = asyncio.Event()
        ended.append(end)
        server_reader, server_writer = await asyncio.open_unix_connection(to)
        await asyncio.gather(copy(reader, server_writer, 0.0), copy(server_reader, writer, delay_s))
        end.set()

    async with await asyncio.start_unix_server(serve, path):
        yield f"unix://{path}"
        for end in ended:
            await end.wait()


@pytest.mark.real
@needs("redis-server")
async def test_a_redis_far_away_is_a_finding(tmp_path: Path) -> None:
    async with (
        redis_server(tmp_path) as server,
        slow_way(tmp_path / "slow.sock", tmp_path / "redis.sock", SLOW_S) as url,
        gateway(url) as far,
        gateway(server.url) as near,
    ):
        await wait_until(lambda: [finding.code for finding in far.places.findings()] == ["redis-slow"], "it is slow")
        assert near.places.findings() == ()
