"""Sends benchmark requests over plain HTTP: to the local port of a node's tunnel, or through the mesh's gateway.

The scenario ``overhead`` sends over these routes, and through the mesh itself, in turn.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import aiohttp

from gpumesh.backends.base import ChatRequest, Chunk, HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.bench.load import AnswerStream
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import BackendStatus, BackendUnreachable, StreamCut
from gpumesh.topology import BackendKind
from gpumesh.tunnels.local_system.unix_urls import split_unix_url

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
        http: aiohttp.ClientSession,
        base_url: str,
        kind: BackendKind,
        *,
        through_gateway: bool = False,
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._http = http
        self._base_url = base_url
        self._dialect = DIALECTS[kind]
        self._through_gateway = through_gateway
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

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
            async with self._http.request(
                call.method,
                self._base_url + call.path,
                data=call.body,
                headers=self._headers(call, node),
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    body = await response.content.read(MAX_ERROR_BYTES)
                    message = self._dialect.error_text(response.status, body)
                    raise BackendStatus(message, status=response.status, body=body, node=node)
                yield _HttpAnswer(self._read_chunks(response, stream=request.stream), node)
        except aiohttp.ClientPayloadError as error:  # the connection has ended in the middle of the body
            raise StreamCut(f"the answer stopped short: {error}", node=node) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise BackendUnreachable(f"no answer: {str(error) or type(error).__name__}", node=node) from error

    def _headers(self, call: HttpCall, node: str | None) -> list[tuple[str, str]]:
        """The headers of a request: those of its API, the node for the gateway, and the API key."""
        headers = [*call.headers]
        if self._through_gateway and node is not None:
            headers.append(("X-GPUMesh-Node", node))
        if self._api_key is not None:
            headers.append(("Authorization", f"Bearer {self._api_key}"))
        return headers

    async def _read_chunks(self, response: aiohttp.ClientResponse, *, stream: bool) -> AsyncGenerator[Chunk]:
        """Yields the pieces of the answer as they arrive. ``stream``: the request asked for a streamed answer."""
        reader = self._dialect.create_reader(stream=stream)
        async for data in response.content.iter_any():
            for chunk in reader.feed(data):
                yield chunk
        for chunk in reader.close():
            yield chunk


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
    socket_path, base_url = _split_socket(url)
    async with http_session(socket_path) as http:
        yield HttpRoute(http, base_url, kind, through_gateway=through_gateway, api_key=api_key)


def _split_socket(url: str) -> tuple[str | None, str]:
    """Splits ``url`` into the path of its Unix socket (``None`` if it has none) and the base URL for requests.

    The base URL for a socket names ``localhost``: HTTP needs a host, but the requests go to the socket.
    """
    if url.startswith(UNIX_PREFIX):  # the form of the gateway's state
        return url.removeprefix(UNIX_PREFIX), "http://localhost"
    socket_and_prefix = split_unix_url(url)  # the form of a node's state
    if socket_and_prefix is None:
        return None, url
    socket_path, prefix = socket_and_prefix
    return socket_path, f"http://localhost{prefix}"


@asynccontextmanager
async def http_session(unix_socket: str | None = None) -> AsyncGenerator[aiohttp.ClientSession]:
    """Opens an HTTP client without proxies and cookies. With ``unix_socket``, all requests go to this socket.

    The number of connections is not limited: the load generator decides how many requests run at once.
    """
    if unix_socket is None:
        connector: aiohttp.BaseConnector = aiohttp.TCPConnector(limit=0)
    else:
        connector = aiohttp.UnixConnector(unix_socket, limit=0)
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    ) as session:
        yield session
