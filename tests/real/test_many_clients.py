"""The command on a usual machine, whose soft limit is 1,024 files: many clients that only hold a connection."""

from __future__ import annotations

import asyncio
import resource
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest

from gpumesh.lab.ollama import SimOllama
from tests.gateway.fleet import MODEL, metric, quick_host
from tests.http_clients import loopback_client
from tests.real.command import Gpumesh, write_config

pytestmark = [pytest.mark.real, pytest.mark.slow]

USUAL = 1024
IDLE = 600  # half of 1,024 and more
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": False}


async def test_hundreds_of_idle_connections_lock_nobody_out(alone: Gpumesh) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with SimOllama(quick_host("a")) as host, AsyncExitStack() as stack:
        write_config(alone.config, [{"name": "a", "backend": {"url": host.url}}], model=MODEL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL, hard), hard))
        try:
            await alone("up", "-d")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        stack.push_async_callback(alone, "down", code=None)
        url = (await alone("status", "--json")).json()["gateway"]["url"]
        for _ in range(IDLE):
            _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
            stack.callback(writer.close)
        async with loopback_client(base_url=url, timeout=30) as client:
            for _ in range(3):
                assert (await client.post("/api/chat", json=CHAT)).status_code == 200
            told = (await client.get("/metrics")).text
        assert metric(told, "gpumesh_client_connections_refused_total") == 0
        if hard > USUAL:
            assert metric(told, "process_max_fds") > USUAL
            assert metric(told, "gpumesh_client_connections") > IDLE
