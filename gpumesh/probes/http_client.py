"""The HTTP client of probes, and of whatever else is asked now and then: short calls, no proxies from the environment,
no redirects to elsewhere, no compression. A caller bounds what it takes of a body, and for how long; it reads what came
(``aiter_raw``), since what is unpacked has no bound."""

from __future__ import annotations

import ssl
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpcore
import httpx

from gpumesh.probes.paced_network import PacedNetwork
from gpumesh.tunnels.local_system.unix_sockets import SUFFIX
from gpumesh.tunnels.local_system.unix_urls import split_unix_url

TIMEOUT_S = 10.0
KEEPALIVE_S = 5.0  # as httpx has it


def http_client(*, timeout: httpx.Timeout | float = TIMEOUT_S) -> httpx.AsyncClient:
    """As many connections as are asked for: the caller bounds what runs at once. Raises, on use, ``httpx.HTTPError``
    for whatever a server does."""
    return httpx.AsyncClient(
        transport=_Transport(),
        cookies=_no_cookies(),
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        headers={"Accept-Encoding": "identity"},
    )


def _no_cookies() -> CookieJar:
    """A jar that takes none. Cookies know no ports: those of one node's end of a tunnel would go to all the others,
    which are on the same loopback address, until their servers refuse heads of that size."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


@cache
def _tls() -> ssl.SSLContext:
    """Made once: reading the authorities' certificates takes 20 ms."""
    return httpx.create_ssl_context(trust_env=False)


def parse_unix_url(url: httpx.URL) -> tuple[str, str] | None:
    """As ``split_unix_url``, of a URL that httpx has read: it leaves the colon after the host out."""
    if url.host != "unix" or url.port is not None:
        return None
    unix = split_unix_url(f"{url.scheme}://unix:{url.raw_path.decode('ascii')}")
    return unix if unix is not None and unix[0].endswith(SUFFIX) else None  # else a host that is called unix


def _pool(uds: str | None) -> httpx.AsyncHTTPTransport:
    """httpx hands no network on to httpcore: its pool is replaced by one like it."""
    transport = httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False)
    transport._pool = httpcore.AsyncConnectionPool(
        ssl_context=_tls(),
        max_connections=None,
        keepalive_expiry=KEEPALIVE_S,
        uds=uds,
        network_backend=PacedNetwork(),
    )
    return transport


def _leads_somewhere(here: httpx.URL, location: str) -> bool:
    """httpx reads where a redirect leads even if it is not followed, and raises what the idna package raises for a host
    name that is none."""
    try:
        there = here.join(httpx.URL(location))
        return bool(there.host)
    except (httpx.InvalidURL, ValueError):
        return False


class _Transport(httpx.AsyncBaseTransport):
    """A pool for each server: httpcore looks through all connections of a pool at each request, so that one pool for
    the three calls to each of a hundred nodes took 40 % of a core. Knows the URLs of Unix sockets."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str, int | None], httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        unix = parse_unix_url(request.url)
        if unix is not None:
            request.url = httpx.URL(f"{request.url.scheme}://localhost{unix[1]}")
            if request.headers.get("Host") == "unix":  # what httpx made of the URL
                request.headers["Host"] = "localhost"
        origin = (request.url.scheme, request.url.host if unix is None else unix[0], request.url.port)
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = _pool(None if unix is None else unix[0])
        try:
            response = await pool.handle_async_request(request)
        except (AttributeError, OSError) as error:
            # A connection that is reset as soon as it stands, as at the end of a tunnel with nobody behind it: the
            # socket is gone when anyio asks it for its peer, and that error httpx does not translate.
            raise httpx.ConnectError("connection reset by peer", request=request) from error
        if "Location" in response.headers and not _leads_somewhere(request.url, response.headers["Location"]):
            del response.headers["Location"]
        return response

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
