"""Sends benchmark requests over plain HTTP: to the local port of a node's tunnel, or through the mesh's gateway.

The scenario ``overhead`` sends over these routes, and through the mesh itself, in turn. All of them use the HTTP client
of the mesh (``Upstream``), so that the differences between the routes are not differences between clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from gpumesh.backends.base import ChatRequest, Chunk, HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.bench.load.send_prompt import AnswerStream
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import BackendStatus, BackendUnreachable
from gpumesh.mesh.requests.upstream import Upstream, UpstreamResponse
from gpumesh.topology import BackendKind
from gpumesh.tunnels.local_system.unix_urls import unix_url

MAX_ERROR_BYTES = 1 << 16  # of an error's body that are read for its message


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The API keys of the gateway and of the nodes' servers (by the node's name).

    The mesh adds these keys to its own requests, but the routes of this file start outside the mesh.
    """

    gateway: str | None = None
    nodes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class HttpRoute:
    """A ``SendPrompt`` that sends over plain HTTP to one base URL. ``kind`` is the kind of server, which tells its API.

    ``api_key`` is sent as a Bearer token. With ``through_gateway``, a header tells the gateway which node to use.
    ``timeout_s`` limits a whole request, with its answer.
    """

    def __init__(
        self,
        upstream: Upstream,
        base_url: str,
        kind: BackendKind,
        *,
        through_gateway: bool = False,
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._upstream = upstream
        self._base_url = base_url
        self._dialect = DIALECTS[kind]
        self._through_gateway = through_gateway
        self._api_key = api_key
        self._timeout_s = timeout_s

    def __call__(self, request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]:
        return self._send(request, node)

    @asynccontextmanager
    async def _send(self, request: ChatRequest, node: str | None) -> AsyncGenerator[AnswerStream]:
        """Sends the request and yields its answer.

        Raises BackendStatus for another status than 200, StreamCut when the answer breaks off, and BackendUnreachable
        when no answer comes.
        """
        call = self._dialect.build_chat_call(request)
        try:
            async with asyncio.timeout(self._timeout_s):
                headers = self._headers(call, node)
                response = await self._upstream.request(self._base_url, call, headers, node=node or "")
                try:
                    if response.status != 200:
                        body = await _read_error(response)
                        message = self._dialect.error_text(response.status, body)
                        raise BackendStatus(message, status=response.status, body=body, node=node)
                    yield _HttpAnswer(self._read_chunks(response, stream=request.stream), node)
                finally:
                    response.abort()
        except TimeoutError as error:
            raise BackendUnreachable(f"no answer within {self._timeout_s:g} s", node=node) from error

    def _headers(self, call: HttpCall, node: str | None) -> list[tuple[str, str]]:
        """The headers of a request: those of its API, the node for the gateway, and the API key."""
        headers = [*call.headers]
        if self._through_gateway and node is not None:
            headers.append(("X-GPUMesh-Node", node))
        if self._api_key is not None:
            headers.append(("Authorization", f"Bearer {self._api_key}"))
        return headers

    async def _read_chunks(self, response: UpstreamResponse, *, stream: bool) -> AsyncGenerator[Chunk]:
        """Yields the pieces of the answer as they arrive. ``stream``: the request asked for a streamed answer."""
        reader = self._dialect.create_reader(stream=stream)
        while data := await response.read():
            for chunk in reader.feed(data):
                yield chunk
        for chunk in reader.close():
            yield chunk


async def _read_error(response: UpstreamResponse) -> bytes:
    """Reads the body of an error, at most ``MAX_ERROR_BYTES`` of it."""
    body = b""
    while len(body) < MAX_ERROR_BYTES and (data := await response.read(MAX_ERROR_BYTES - len(body))):
        body += data
    return body


class _HttpAnswer:
    """An ``AnswerStream`` of one attempt: these routes have no failover."""

    def __init__(self, chunks: AsyncIterator[Chunk], node: str | None) -> None:
        self._chunks = chunks
        self.node = node
        self.attempts = 1

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks


@asynccontextmanager
async def http_route(
    url: str, kind: BackendKind, *, through_gateway: bool = False, api_key: str | None = None
) -> AsyncGenerator[HttpRoute]:
    """Opens a route to ``url``: the URL of a node or of the gateway as the mesh's state has it, or a Unix socket."""
    base_url = unix_url(Path(url.removeprefix(UNIX_PREFIX))) if url.startswith(UNIX_PREFIX) else url
    async with Upstream() as upstream:
        yield HttpRoute(upstream, base_url, kind, through_gateway=through_gateway, api_key=api_key)
