"""The bytes that a real connection has received, as this machine's kernel counts them."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from gpumesh.pools.hosts.worker_traffic import read_received_bytes
from tests.pools.hosts.local_route import local_route


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss")
async def test_the_bytes_of_a_connection_are_counted() -> None:
    connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.put_nowait((reader, writer))

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with local_route() as route:
        assert await read_received_bytes(route, port) is None, "nothing is connected"
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(bytes(300_000))
        await writer.drain()
        reader, server_writer = await connected.get()
        await reader.readexactly(300_000)
        assert await read_received_bytes(route, port) == 300_000
        writer.close()
        server_writer.close()
        await writer.wait_closed()
    server.close()
