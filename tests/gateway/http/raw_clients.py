"""A server on raw sockets, with or without a gateway, and clients that do what well-behaved ones do not."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.server import Server
from gpumesh.gateway.http.streaming_response import StreamingResponse
from tests.gateway.fleet import MODEL, RunningGateway

SHORT = Bounds(
    head_timeout_s=0.3,
    body_timeout_s=0.3,
    min_bytes_per_s=1000,
    write_timeout_s=0.5,
    keepalive_s=1.0,
    linger_s=0.2,
    max_body_bytes=10_000,
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": False}).encode()


def post(body: bytes, *more: str, length: int | None = None, path: str = "/api/chat") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode() + body


@asynccontextmanager
async def connect(fleet: RunningGateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer with a length, on a connection that stays."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def expect_silence(reader: asyncio.StreamReader, seconds: float) -> None:
    """Neither a byte nor the end comes in that time."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), seconds)


def count_connections(fleet: RunningGateway) -> int:
    return fleet.gateway._server.connection_count


on_both_loops = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
Run = Callable[[Coroutine[Any, Any, None]], None]


class RunningServer:
    """``seen``: the requests that came to the handler."""

    def __init__(self, serving: Server, port: int) -> None:
        self.server = serving
        self.port = port
        self.seen: list[Request] = []

    def has_unsent_bytes(self) -> bool:
        return any(connection.writer.unsent_bytes for connection in self.server._connections)


@asynccontextmanager
async def run_server(handler: Handler, bounds: Bounds = SHORT, **options: Any) -> AsyncIterator[RunningServer]:
    async def record_and_handle(request: Request) -> Response | StreamingResponse:
        running.seen.append(request)
        return await handler(request)

    server = Server(record_and_handle, bounds, **options)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    running = RunningServer(server, listening.sockets[0].getsockname()[1])
    try:
        yield running
    finally:
        listening.close()
        await server.close()


async def answer_fine(_: Request) -> Response:
    return Response(b"fine")


async def echo(request: Request) -> Response:
    try:
        return Response(await request.read_body())
    except BadRequest as error:
        return Response(error.message.encode(), status=error.status)


async def open_small_window(port: int, *, receive: int = 4096) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client whose socket takes little while the client does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=client, limit=receive)


async def read_slowly(reader: asyncio.StreamReader, size: int, *, each: int, pause_s: float) -> int:
    """Returns how many bytes came until there were ``size`` or the connection ended."""
    received = 0
    while received < size and (piece := await asyncio.wait_for(reader.read(each), 10)):
        received += len(piece)
        await asyncio.sleep(pause_s)  # a slow reader is what is tested
    return received


UPGRADE = "Connection: Upgrade\r\nUpgrade: h2c\r\n"
LARGE = b"x" * (8 << 20)


async def answer_large(_: Request) -> Response:
    return Response(LARGE)
