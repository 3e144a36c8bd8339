"""A server that does exactly what a test scripts, byte by byte, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Script = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request on a connection. ``number`` counts the requests of this connection from 1."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes
    body: bytes
    number: int
    closed: bool = False

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """RST rather than FIN."""
        self.writer.transport.abort()
        self.closed = True

    def close(self) -> None:
        self.writer.close()
        self.closed = True

    async def wait_client_gone(self) -> None:
        """Returns when the client has closed its side."""
        await self.reader.read(1)


@dataclass
class ScriptedServer:
    url: str
    port: int
    connections: int = 0
    requests: list[Exchange] = field(default_factory=list)


@asynccontextmanager
async def serve(script: Script) -> AsyncIterator[ScriptedServer]:
    writers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Registers the task before it runs: a connection just before the end is cancelled without having run."""
        scripted.connections += 1
        writers[asyncio.create_task(connected(reader, writer))] = writer

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            number = 0
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                number += 1
                exchange = Exchange(reader, writer, head, await reader.readexactly(length), number)
                scripted.requests.append(exchange)
                await script(exchange)
                if exchange.closed:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or ``serve`` ends: nobody else cancels it
        finally:
            writer.close()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    scripted = ScriptedServer(f"http://127.0.0.1:{port}", port)
    try:
        yield scripted
    finally:
        server.close()
        for task in writers:
            task.cancel()
        ended = await asyncio.gather(*writers, return_exceptions=True)
        for writer in writers.values():
            writer.transport.abort()
        await asyncio.sleep(0)  # the transports close
        await server.wait_closed()
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure  # what the script asserted


def answer_with(*pieces: bytes, close: bool = False, reset: bool = False) -> Script:
    """The same to every request."""

    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
        if reset:
            exchange.reset()
        if close:
            exchange.close()

    return script


def whole_response(body: bytes, *, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chunked_head(kind: str = "application/x-ndjson") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


LAST_CHUNK = b"0\r\n\r\n"
