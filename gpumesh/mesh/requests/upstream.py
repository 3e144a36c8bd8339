"""``Upstream``: the HTTP client of the hot path. It sends a request to a backend, and passes on the response.

It is built on an ``asyncio.Protocol`` because each token passes here: `benchmarks/gateway.py` shows the cost of a
general client. The probes use such a client, httpx. This client has only the features that a backend needs: one request
at a time on a keep-alive connection, and TLS; no redirects, cookies, proxies or decompression. The parser is in
response_parser.py, the connection in upstream_connection.py, the pool in connection_pool.py.

All errors are translated here: to BackendUnreachable before the response's head, to StreamCut inside its body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Self
from urllib.parse import urlsplit

from gpumesh.backends.answer_head import read_head
from gpumesh.backends.base import HttpCall
from gpumesh.errors import BackendUnreachable, StreamCut
from gpumesh.event_loop.slice_queue import FRAME_SLICE_BYTES, SliceQueue
from gpumesh.mesh.requests.body_sink import BodySink
from gpumesh.mesh.requests.connections.connection_pool import CONNECT_TIMEOUT_S, ConnectionPool
from gpumesh.mesh.requests.connections.response_parser import ResponseHead
from gpumesh.mesh.requests.connections.upstream_connection import Address, Exchange, UpstreamConnection, exception_text
from gpumesh.mesh.requests.task_deadlines import TaskDeadlines
from gpumesh.tunnels.local_system.unix_urls import split_unix_url


class UpstreamResponse:
    """One response. The holder must ``read`` it to the end, push it to a sink, or ``abort`` it.

    ``headers`` are those that a client may get. ``problem``: why no inference server can have sent this response;
    ``None`` if there is no such reason. ``content_length`` is ``None`` if the server announced no length.
    ``ends_with_connection``: see ``ResponseHead``.
    """

    __slots__ = (
        "_exchange",
        "_has_unread_slice",
        "_node",
        "_sink",
        "_slice_queue",
        "content_length",
        "content_type",
        "ends_with_connection",
        "headers",
        "problem",
        "status",
    )

    def __init__(self, head: ResponseHead, exchange: Exchange, slices: SliceQueue, node: str) -> None:
        self._exchange = exchange
        self._slice_queue = slices
        self._node = node
        self._sink: BodySink | None = None
        self._has_unread_slice = False
        self.status = head.status
        self.content_length = head.content_length
        self.ends_with_connection = head.ends_with_connection
        is_empty = head.content_length == 0 or head.status == 204  # 204: no content
        client_head = read_head(head.status, head.fields, empty=is_empty)
        self.content_type = client_head.media_type
        self.headers = client_head.headers
        self.problem = client_head.problem

    def __repr__(self) -> str:
        progress = "ended" if self._exchange.connection is None else "under way"
        return f"<UpstreamResponse {self._node} {self.status} {progress} {self._exchange.buffer!r}>"

    async def read(self, limit: int | None = None) -> bytes:
        """Waits for the next bytes of the body, and returns at most ``limit`` of them; empty at the end. Raises
        StreamCut when the body has ended before it was complete."""
        buffer = self._exchange.buffer
        while not buffer:
            if buffer.problem is not None:
                raise StreamCut(f"the answer stopped short: {buffer.problem}", node=self._node)
            if buffer.ended:
                return b""
            await buffer.wait_changed()
        return buffer.take(limit)

    async def read_slice(self) -> bytes:
        """Like ``read``, for a reader that parses each frame. Returns a small slice, and lets other connections have
        their turn between two slices of one read."""
        if self._has_unread_slice:
            await self._slice_queue.wait_turn()
        data = await self.read(FRAME_SLICE_BYTES)
        self._has_unread_slice = len(self._exchange.buffer) > 0
        return data

    def take_whole(self, limit: int) -> bytes | None:
        """Returns the whole body if it has come already and is not longer than ``limit`` bytes; ``None`` otherwise."""
        buffer = self._exchange.buffer
        is_complete = buffer.ended and buffer.problem is None
        return buffer.take() if is_complete and len(buffer) <= limit else None

    def push_to(self, sink: BodySink) -> None:
        """Pushes the body to this sink from now on: first the bytes that are held for a reader, then each byte as it
        arrives."""
        self._sink = sink
        if self._has_unread_slice:  # ``read_slice`` has taken a slice: now other connections have their turn
            self._slice_queue.add(self._push_buffer)
        else:
            self._push_buffer()

    def _push_buffer(self) -> None:
        """Pushes the held bytes, slice by slice. After the last slice, the connection pushes to the sink directly."""
        buffer, sink, connection = self._exchange.buffer, self._sink, self._exchange.connection
        if sink is None:  # the response was aborted
            return
        if buffer and sink.backpressured:
            sink.on_writable = self._push_buffer
            return
        sink.on_writable = None
        if buffer:
            sink.write(buffer.take(FRAME_SLICE_BYTES if sink.inspects_frames else None))
        if buffer:
            self._slice_queue.add(self._push_buffer)
            return
        self._sink = None
        if connection is not None:
            connection.push_to(sink)
        elif buffer.problem is not None:
            sink.fail(buffer.problem)
        else:
            sink.finish()

    def abort(self) -> None:
        """Closes the connection, so that the server stops working on the request. Does nothing after the end."""
        if self._exchange.connection is not None:
            self._exchange.connection.abort()
        self._sink = None


class Upstream:
    """Sends requests over a pool of keep-alive connections to all backends. Use it as an async context manager.

    ``deadlines`` holds the deadlines of all attempts."""

    deadlines: TaskDeadlines
    _pool: ConnectionPool

    def __repr__(self) -> str:
        return f"<Upstream {getattr(self, '_pool', 'not open')!r}>"

    async def __aenter__(self) -> Self:
        """Creates the pool for the running event loop."""
        loop = asyncio.get_running_loop()
        self.deadlines = TaskDeadlines(loop)
        self._pool = ConnectionPool(loop)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes all connections."""
        self._pool.close()
        self.deadlines.close()
        await asyncio.sleep(0)  # the transports close in the next turn of the event loop

    async def request(
        self,
        base_url: str,
        call: HttpCall,
        headers: Sequence[tuple[str, str]],
        *,
        node: str,
        host: str | None = None,
        server_name: str | None = None,
        new_connection: bool = False,
        may_resend: Callable[[float], bool] = lambda _: True,
    ) -> UpstreamResponse:
        """Sends the request, and returns the response when its head has come. If the call is cancelled, the connection
        is closed.

        ``host`` is the Host header; ``None``: the address in the URL. ``server_name`` is the name that the TLS
        certificate must have; ``None``: the host in the URL.

        A server may close a kept-alive connection at any time: this is not a failure of the server. If such a
        connection ends without any part of an answer, ``may_resend`` gets the seconds since the sending, and decides
        whether the request is sent again. It is sent again at most once, over a new connection, where this cannot
        happen. ``new_connection``: the request goes over a new connection from the start. Raises BackendUnreachable.
        """
        address, prefix, default_host = parse_base_url(base_url, server_name)
        head = render_head(call, prefix, headers, default_host if host is None else host)
        clock = self.deadlines.loop.time
        while True:
            connection = None if new_connection else self._pool.take_idle(address)
            if connection is None:
                connection = await self._connect(address, node)
            sent_at = clock()
            exchange = connection.start_exchange(call.method, head, call.body)
            try:
                response_head = await exchange.head
            except ConnectionResetError as error:
                was_kept_alive = connection.request_count > 1
                if was_kept_alive and not exchange.answered and may_resend(clock() - sent_at):
                    new_connection = True  # so the request is not sent a third time
                    continue
                # The traceback's frames hold the request's body, and would form a cycle with the error.
                cause = error.with_traceback(None)
                raise BackendUnreachable(f"no answer: {error}", node=node, request_sent=True) from cause
            except BaseException:  # the call was cancelled
                if exchange.connection is not None:  # the exchange has not ended
                    connection.abort()
                raise
            return UpstreamResponse(response_head, exchange, self._pool.slices, node)

    async def _connect(self, address: Address, node: str) -> UpstreamConnection:
        """Opens a new connection. Raises BackendUnreachable."""
        try:
            return await self._pool.connect(address)
        except TimeoutError as error:
            raise BackendUnreachable(f"no connection within {CONNECT_TIMEOUT_S:g} s", node=node) from error
        except OSError as error:
            raise BackendUnreachable(f"no connection: {exception_text(error)}", node=node) from error


def render_head(call: HttpCall, prefix: str, headers: Sequence[tuple[str, str]], host: str) -> bytes:
    """Renders the request's head as it is sent. ``prefix`` comes before the call's path. ``headers`` hold no Host.
    Raises ValueError if a header contains a line end."""
    head = _render_fields(call.method, prefix + call.path, tuple(headers), host)
    if call.body or call.method not in ("GET", "HEAD"):
        return b"%bContent-Length: %d\r\n\r\n" % (head, len(call.body))
    return head + b"\r\n"


@lru_cache(maxsize=64)  # a client sends the same headers with each request
def _render_fields(method: str, target: str, headers: tuple[tuple[str, str], ...], host: str) -> bytes:
    """Renders the head without the length of the body and without the empty line after it."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join(lines)
    # The only line ends are those between the lines; otherwise a header could add a line of its own.
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ValueError("a line end inside of a header")
    return head.encode("utf-8", "surrogateescape") + b"\r\n"


@lru_cache(maxsize=1024)
def parse_base_url(base_url: str, server_name: str | None) -> tuple[Address, str, str]:
    """Returns the server's address, the prefix for the path of each call, and the Host header, in this order."""
    parts = urlsplit(base_url)
    tls = parts.scheme == "https"
    server_name = server_name if tls else None
    unix_parts = split_unix_url(base_url)
    if unix_parts is not None:
        socket, path = unix_parts
        address = Address("localhost", 0, tls, server_name, socket)
        return address, path.rstrip("/"), "localhost"
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if tls else 80)
    address = Address(host, port, tls, server_name, None)
    return address, parts.path.rstrip("/"), f"{host}:{port}"
