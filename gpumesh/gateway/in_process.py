"""``InProcessClient`` sends requests of this process through the gateway's own handling, without a socket.

So a request of a batch has what a client's request has: rules for models and keys, quotas, a line in the access log,
metrics, a place in the list of requests in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.parser import RequestHead
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import HeaderPairs, Headers, Response
from gpumesh.gateway.http.server import Server
from gpumesh.gateway.http.streaming_response import StreamingResponse

MAX_REPLY_BYTES = 64 << 20  # a server could send without end


@dataclass(frozen=True, slots=True)
class InProcessReply:
    """The whole reply to a request. ``headers``: the fields by their names in lower case."""

    status: int
    headers: Headers
    body: bytes


class InProcessClient:
    """``handle`` answers a request as the gateway does, but does not check its key. ``server`` gives the bounds, and
    the memory that all bodies share. ``address`` stands for the address of the client."""

    def __init__(
        self, handle: Callable[[Request], Awaitable[Response | StreamingResponse]], server: Server, address: str
    ) -> None:
        self._handle = handle
        self._server = server
        self._address = address

    def __repr__(self) -> str:
        return f"<InProcessClient {self._address}>"

    async def post(self, path: str, headers: HeaderPairs, body: bytes, key: ClientKey | None) -> InProcessReply:
        """Sends the body to this path, with the rights of ``key``, and returns the reply: an answer of a node, with
        whatever status. Raises GPUMeshError where a client gets an error of the gateway, and ConnectionError if only a
        part of the answer came, or if it is longer than ``MAX_REPLY_BYTES``. When this call is cancelled, the request
        ends on its node."""
        connection = _InProcessConnection(self._server, self._address)
        head = RequestHead("POST", path, Headers(headers), is_http10=True, keep_alive=False)  # so nothing is chunked
        request = Request(connection, head, self._server.clock())
        request.key = key
        request.body.feed(body)  # without room for it, the handler refuses the request
        request.body.end()
        try:
            reply = await self._handle(request)
        finally:
            request.end()
        if isinstance(reply, Response):
            return InProcessReply(reply.status, Headers(reply.headers), reply.body)
        if not reply.finished:
            raise ConnectionError("the answer was not ended")
        return connection.read_reply(reply.status)


class _InProcessConnection:
    """Stands for the connection of a client that sends one request, and takes its reply at once. Implements
    ``RequestConnection``; see there."""

    registered_key: str | None = None

    def __init__(self, server: Server, address: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.bounds = server.bounds
        self.memory = server.memory
        self.slices = server.slices
        self.client_address: str | None = address
        self._transport = _MemoryTransport()
        self.writer = ClientWriter(self._transport, self.loop, self.bounds, server.turn_writes)

    def keeps_alive(self, request: Request) -> bool:  # noqa: ARG002 - the protocol's name
        return False

    def resume_reading(self) -> None:
        """Does nothing: the whole body is there."""

    def register_key(self, key: str | None) -> str | None:  # noqa: ARG002 - the protocol's name
        return None

    def read_reply(self, status: int) -> InProcessReply:
        """The reply that was written as a stream. Raises ConnectionError if it was too long."""
        self.writer.flush()
        head, _, body = self._transport.join().partition(b"\r\n\r\n")
        lines = head.decode("utf-8", "surrogateescape").split("\r\n")[1:]
        pairs = [line.partition(": ") for line in lines]
        return InProcessReply(status, Headers(tuple((name, value) for name, _, value in pairs)), body)


class _MemoryTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._pieces.append(bytes(data))
        self._size += len(data)
        if self._size > MAX_REPLY_BYTES:
            self._pieces.clear()

    def is_closing(self) -> bool:
        """Whether nothing more is taken, because the reply is too long: then the gateway ends the request."""
        return self._size > MAX_REPLY_BYTES

    def get_write_buffer_size(self) -> int:
        return 0  # what is written is taken at once

    def join(self) -> bytes:
        """All that was written. Raises ConnectionError if it was too much."""
        if self.is_closing():
            raise ConnectionError("the answer is too long")
        return b"".join(self._pieces)
