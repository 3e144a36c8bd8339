"""A backend at the end of a tunnel that is a Unix socket: for the hot path's client, for probes, and for uploads."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.errors import BackendUnreachable
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.probes.http_client import make_http_client, parse_unix_url
from gpumesh.probes.wrong_server import identify_wrong_server, wrong_scheme_error
from gpumesh.tunnels.local_system.unix_urls import unix_url

CALL = HttpCall("POST", "/api/show?x=a:b", b"{}")
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(params=["x.sock", "Über all: 100%.sock"])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        yield Path(folder) / request.param


@contextlib.asynccontextmanager
async def serving(path: Path, answer: bytes = WHOLE, *, greets: bool = False) -> AsyncIterator[list[bytes]]:
    """A server that gives this answer to each request, or to whoever connects; the heads of the requests."""
    heads: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(EOFError, ConnectionError):
            if greets:
                writer.write(answer)
            while True:
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                if not greets:
                    writer.write(answer)

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield heads
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("prefix", ["", "/behind"])
async def test_the_upstream_client_over_a_unix_socket(path: Path, prefix: str) -> None:
    url = unix_url(path, prefix=prefix)
    async with asyncio.timeout(20), serving(path) as heads, Upstream() as upstream:
        for host in (None, "127.0.0.1:11434"):
            response = await upstream.request(url, CALL, (), node="n", host=host)
            assert await response.read() == b"ok"
    first, second = heads
    assert first.startswith(f"POST {prefix}/api/show?x=a:b HTTP/1.1\r\n".encode())
    assert b"Host: localhost\r\n" in first
    assert b"Host: 127.0.0.1:11434\r\n" in second


async def test_a_socket_without_a_server_is_unreachable(path: Path) -> None:
    async with asyncio.timeout(20), Upstream() as upstream:
        with pytest.raises(BackendUnreachable, match="no connection"):
            await upstream.request(unix_url(path), CALL, [], node="n")
    async with make_http_client() as client:
        with pytest.raises(httpx.HTTPError):
            await client.get(unix_url(path) + "/")


@pytest.mark.parametrize("prefix", ["", "/behind"])
async def test_the_probes_client_over_a_unix_socket(path: Path, prefix: str) -> None:
    url = unix_url(path, prefix=prefix)
    async with asyncio.timeout(20), serving(path) as heads, make_http_client() as client:
        assert (await client.get(url + CALL.path)).text == "ok"
        assert (await client.get(url + CALL.path, headers={"Host": "127.0.0.1:11434"})).text == "ok"
    first, second = heads
    assert first.startswith(f"GET {prefix}/api/show?x=a:b HTTP/1.1\r\n".encode())
    assert b"host: localhost\r\n" in first.lower()
    assert b"host: 127.0.0.1:11434\r\n" in second.lower()


async def test_a_server_that_is_no_inference_server_is_identified(path: Path) -> None:
    async with asyncio.timeout(20), serving(path, b"SSH-2.0-OpenSSH_9.2\r\n", greets=True):
        error = await identify_wrong_server(unix_url(path))
        assert error is not None
        assert "an SSH server" in error.message
    assert "https://127.0.0.1:PORT" in (wrong_scheme_error(unix_url(path)).hint or "")


@pytest.mark.parametrize(
    "url", ["http://unix/v1/models/a:b", "http://unix:8080/x.sock:/", "http://127.0.0.1:1/x.sock:/"]
)
def test_a_host_named_unix_is_a_host(url: str) -> None:
    assert parse_unix_url(httpx.URL(url)) is None
