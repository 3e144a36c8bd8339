"""The HTTP client of the hot path: one request to one backend, its answer as it comes. On aiohttp; httpx serves the
probes (tunnel-latency.md has the figures).

Errors are translated here, once: BackendUnreachable before the answer's head, StreamCut inside its body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace, TracebackType
from typing import Self

import aiohttp

from gpumesh.backends.base import HttpCall
from gpumesh.errors import BackendUnreachable, StreamCut

CONNECT_TIMEOUT_S = 3.0
KEEPALIVE_S = 30.0
READ_BUFFER = 1 << 16  # bytes held for a reader that is slow; past it the backend is no longer read
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class UpstreamResponse:
    """One answer. Read it to the end or ``abort`` it: a connection goes back to the pool only when it is clean."""

    def __init__(self, response: aiohttp.ClientResponse, node: str) -> None:
        self._response = response
        self._node = node
        self.status = response.status
        self.headers = tuple(
            (name, value)
            for name, value in response.headers.items()
            if name.lower() not in _HOP_BY_HOP and name.lower() != "content-length"
        )
        self.content_type = response.content_type
        self.content_length = response.content_length

    async def read(self) -> bytes:
        """The next piece as it came; empty at the end. Raises StreamCut when the body stops short."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            self._response.close()
            raise StreamCut(f"the answer stopped short: {_words(error)}", node=self._node) from error

    def abort(self) -> None:
        """Closes the connection, so that the server stops working on it. Harmless after the end."""
        self._response.close()


class Upstream:
    """A pool of keep-alive connections to all backends. Use as an async context manager."""

    def __init__(self) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_mark_reused)
        self._trace = trace
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            trace_configs=[trace] if (trace := self._trace) else None,
            read_bufsize=READ_BUFFER,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self, base_url: str, call: HttpCall, headers: Sequence[tuple[str, str]], *, node: str, server_name: str | None
    ) -> UpstreamResponse:
        """Sends and waits for the answer's head. Cancelling it closes the connection.

        A kept-alive connection that the server closed meanwhile is not the server's failure: such a request is sent
        again on another (nothing of it can have been answered, and inference has no side effects).
        Raises BackendUnreachable.
        """
        assert self._session is not None, "use Upstream as an async context manager"
        while True:
            context = SimpleNamespace(reused=False)
            try:
                response = await self._session.request(
                    call.method,
                    base_url + call.path,
                    data=call.body or None,
                    headers=headers,
                    allow_redirects=False,
                    trace_request_ctx=context,
                    server_hostname=server_name,
                )
            except (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError) as error:
                if context.reused:
                    continue
                raise BackendUnreachable(f"no answer: {_words(error)}", node=node) from error
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                # Our own asyncio.timeout scopes turn into TimeoutError only outside of this call.
                raise BackendUnreachable(f"no answer: {_words(error)}", node=node) from error
            return UpstreamResponse(response, node)


async def _mark_reused(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.reused = True


def _words(error: BaseException) -> str:
    """An exception as a person would say it: aiohttp's own texts name host and port, some have no text at all."""
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    return str(error) or type(error).__name__
