"""The HTTP client of probes, and of whatever else is asked now and then: short calls, no proxies from the environment,
no redirects to elsewhere."""

from __future__ import annotations

import httpx

TIMEOUT_S = 10.0


def http_client(*, timeout: httpx.Timeout | float = TIMEOUT_S) -> httpx.AsyncClient:
    """As many connections as are asked for: the caller bounds what runs at once. Raises, on use, ``httpx.HTTPError``
    for whatever a server does."""
    limits = httpx.Limits(max_connections=None)
    transport = _Transport(trust_env=False, limits=limits)
    return httpx.AsyncClient(transport=transport, trust_env=False, follow_redirects=False, timeout=timeout)


class _Transport(httpx.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except (AttributeError, OSError) as error:
            # A connection that is reset as soon as it stands, as at the end of a tunnel with nobody behind it: the
            # socket is gone when anyio asks it for its peer, and that error httpx does not translate.
            raise httpx.ConnectError("connection reset by peer", request=request) from error
