"""The client of probes against servers that are there and gone again."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import struct
import threading
import warnings
from collections.abc import Iterator

import httpx
import pytest

from gpumesh.daemon.process import async_runner
from gpumesh.probes.http_client import forget_servers, make_http_client
from tests.mesh.servers import Exchange, answer_with, serve


@contextlib.contextmanager
def resetting_server() -> Iterator[str]:
    """A server that resets each connection as soon as it stands: so is the end of a tunnel with nobody behind it."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def test_a_connection_that_is_reset_at_once_is_an_http_error() -> None:
    """On the loop that the command runs on: its sockets are gone when they are asked for their peer."""

    async def ask(url: str) -> None:
        async with make_http_client() as client:
            for _ in range(300):
                with pytest.raises(httpx.HTTPError):
                    await client.get(url)

    with resetting_server() as url:
        async_runner.run(ask(url))


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_cancelled_request_leaves_no_socket_to_the_garbage_collector(scheme: str) -> None:
    """To a server that takes the first bytes, of a request or of a TLS handshake, and never answers."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        ended.set()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        async with asyncio.timeout(20), await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with make_http_client() as client:
                request = asyncio.create_task(client.get(f"{scheme}://127.0.0.1:{port}/"))
                await asked.wait()
                request.cancel()
                await asyncio.wait({request})
                await ended.wait()
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


async def test_each_server_has_a_pool_of_its_own() -> None:
    """One pool for many servers is looked through whole at each request."""
    requests: list[tuple[str, int]] = []
    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        connection = writer.get_extra_info("peername")[1]
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client has closed it
            while head := await reader.readuntil(b"\r\n\r\n"):
                requests.append((head.split(b" ")[1].decode(), connection))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()
        writer.close()
        await writer.wait_closed()

    servers = [await asyncio.start_server(serve, "127.0.0.1", 0) for _ in range(3)]
    try:
        async with asyncio.timeout(20), make_http_client() as client:
            for _ in range(2):
                for number, server in enumerate(servers):
                    port = server.sockets[0].getsockname()[1]
                    assert (await client.get(f"http://127.0.0.1:{port}/{number}")).text == "ok"
            assert len({connection for _, connection in requests}) == 3, "and its connection is kept"
        with pytest.raises(RuntimeError, match="closed"):
            await client.get("http://127.0.0.1:1/")
    finally:
        for server in servers:
            server.close()
        await asyncio.gather(*(task for task in served if task is not None))


async def test_connections_to_a_server_that_is_gone_are_closed() -> None:
    closed = asyncio.Event()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()  # until the client closes
        closed.set()
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(10), server, make_http_client() as client:
        await client.get(url)
        assert not closed.is_set()
        await forget_servers(client, [f"{url}/path", "http://127.0.0.1:1"])
        await closed.wait()


async def test_cookies_of_a_server_are_not_sent_to_any_server() -> None:
    """Cookies know no ports: those of one node's server came with the questions to all others on loopback, until these
    refused heads of that size."""
    heads: list[bytes] = []
    cookies = b"".join(b"Set-Cookie: c%d=%s; Path=/\r\n" % (number, b"x" * 3000) for number in range(10))

    async def script(exchange: Exchange) -> None:
        heads.append(exchange.head)
        await exchange.send(b"HTTP/1.1 200 OK\r\n" + cookies + b"Content-Length: 2\r\n\r\n{}")

    async with make_http_client() as client, serve(script) as first, serve(script) as other:
        for url in (first.url, other.url, first.url):
            assert (await client.get(url)).status_code == 200
    assert len(heads) == 3
    assert not any(b"cookie" in head.lower() for head in heads)
    assert max(map(len, heads)) < 1000


@pytest.mark.parametrize(
    "location", [b"http://xn--zzzzzzz--/", b"http://[", b"http://\xff\xfe/", b"//xn--a-/", b"", b"x" * 9000]
)
async def test_a_redirect_to_an_invalid_target_is_a_plain_answer(location: bytes) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 2\r\n\r\n{}"
    async with make_http_client() as client, serve(answer_with(answer)) as server:
        assert (await client.get(server.url)).status_code == 302
