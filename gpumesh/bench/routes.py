"""Routes to one server over plain HTTP: directly to the tunnel's local port, or through the gateway. The benchmark's
own calls of the mesh are not used.

The scenario ``overhead`` sends the same request over each route in turn."""

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

MAX_ERROR_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The API keys of the gateway and of the nodes' servers (by node). Requests through the mesh
    get their keys from it, but these routes start outside the mesh."""

    gateway: str | None = None
    nodes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class HttpRoute:
    """A ``SendPrompt`` over plain HTTP to one base URL. ``api_key`` is sent as a Bearer token."""

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
        except aiohttp.ClientPayloadError as error:
            raise StreamCut(f"the answer stopped short: {error}", node=node) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise BackendUnreachable(f"no answer: {str(error) or type(error).__name__}", node=node) from error

    def _headers(self, call: HttpCall, node: str | None) -> list[tuple[str, str]]:
        headers = [*call.headers]
        if self._through_gateway and node is not None:
            headers.append(("X-GPUMesh-Node", node))
        if self._api_key is not None:
            headers.append(("Authorization", f"Bearer {self._api_key}"))
        return headers

    async def _read_chunks(self, response: aiohttp.ClientResponse, *, stream: bool) -> AsyncGenerator[Chunk]:
        reader = self._dialect.create_reader(stream=stream)
        async for data in response.content.iter_any():
            for chunk in reader.feed(data):
                yield chunk
        for chunk in reader.close():
            yield chunk


class _HttpAnswer:
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
    """A route to a base URL in the form of a node's or the gateway's state, which may name a Unix socket."""
    socket_path, base_url = _split_socket(url)
    async with http_session(socket_path) as http:
        yield HttpRoute(http, base_url, kind, through_gateway=through_gateway, api_key=api_key)


def _split_socket(url: str) -> tuple[str | None, str]:
    """The path of the Unix socket that ``url`` names, or ``None``, and the base URL for requests."""
    if url.startswith(UNIX_PREFIX):  # the gateway's
        return url.removeprefix(UNIX_PREFIX), "http://localhost"
    socket_and_prefix = split_unix_url(url)  # a node's
    if socket_and_prefix is None:
        return None, url
    socket_path, prefix = socket_and_prefix
    return socket_path, f"http://localhost{prefix}"


@asynccontextmanager
async def http_session(unix_socket: str | None = None) -> AsyncGenerator[aiohttp.ClientSession]:
    """An HTTP client without proxies and cookies. With ``unix_socket`` all requests go to that socket."""
    connector = aiohttp.TCPConnector(limit=0) if unix_socket is None else aiohttp.UnixConnector(unix_socket, limit=0)
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    ) as session:
        yield session
