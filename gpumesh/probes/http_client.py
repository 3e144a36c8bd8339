"""The HTTP client of probes and of other rare requests: no proxies from the environment, no redirects, no compression.

The caller must limit how much of a body it reads, and for how long. It must read the body as received (``aiter_raw``),
because a small compressed body can unpack to any size.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpcore
import httpx

from gpumesh.probes.paced_network import PacedNetwork
from gpumesh.tunnels.local_system.unix_sockets import SUFFIX
from gpumesh.tunnels.local_system.unix_urls import split_unix_url

TIMEOUT_S = 10.0
KEEPALIVE_S = 5.0  # httpx's own default


def make_http_client(*, timeout: httpx.Timeout | float = TIMEOUT_S) -> httpx.AsyncClient:
    """A new client. The number of its connections is not limited: the caller limits how many requests run at once. A
    request that fails because of what the server does raises ``httpx.HTTPError`` and no other error."""
    return httpx.AsyncClient(
        transport=_TransportPerServer(),
        cookies=_no_cookies(),
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        headers={"Accept-Encoding": "identity"},
    )


def _no_cookies() -> CookieJar:
    """A jar that takes no cookies. Cookies do not distinguish ports, and all tunnels end at one loopback address. So
    one node's cookies would go to all other nodes, until their servers refuse requests with heads of that size."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


@cache
def _tls_context(scheme: str) -> ssl.SSLContext:
    """The TLS settings of all connections to servers of this scheme: the authorities that this system trusts, as for
    the requests of clients (mesh/requests/connection_pool.py). httpx's own settings have another list of authorities,
    so a server with a company's certificate would get requests but fail every probe.

    The settings are made only once, because reading the certificates takes 20 ms. For ``http`` they are never used, but
    httpx wants settings in any case, so they have no certificates.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if scheme == "http" else ssl.create_default_context()


def parse_unix_url(url: httpx.URL) -> tuple[str, str] | None:
    """The path of the Unix socket, and the path of the request there; ``None`` for another URL. Does the same as
    ``split_unix_url`` for a URL that httpx has parsed, because httpx drops the colon after the host."""
    if url.host != "unix" or url.port is not None:
        return None
    unix_parts = split_unix_url(f"{url.scheme}://unix:{url.raw_path.decode('ascii')}")
    if unix_parts is None:
        return None
    socket_path, _request_path = unix_parts
    return unix_parts if socket_path.endswith(SUFFIX) else None  # any other path: "unix" is the name of a host


def _create_transport(scheme: str, socket_path: str | None) -> httpx.AsyncHTTPTransport:
    """A transport of httpx that uses our ``PacedNetwork``, for the Unix socket at ``socket_path``, or for TCP if that
    is ``None``. Its TLS settings are for this scheme only. httpx has no option for the network, so the transport's pool
    is replaced."""
    transport = httpx.AsyncHTTPTransport(verify=_tls_context(scheme), trust_env=False)
    transport._pool = httpcore.AsyncConnectionPool(
        ssl_context=_tls_context(scheme),
        max_connections=None,
        keepalive_expiry=KEEPALIVE_S,
        uds=socket_path,
        network_backend=PacedNetwork(),
    )
    return transport


def _is_valid_redirect(url: httpx.URL, location: str) -> bool:
    """Whether httpx can parse the target of a redirect. httpx parses the target even if it does not follow the
    redirect. For a host name that is not valid, httpx raises an error of the idna package instead of its own."""
    try:
        return bool(url.join(httpx.URL(location)).host)
    except (httpx.InvalidURL, ValueError):  # idna's error is a ValueError
        return False


_Origin = tuple[str, str, int | None]
"""The scheme, the host or the path of the Unix socket, and the port."""


class _TransportPerServer(httpx.AsyncBaseTransport):
    """One transport of httpx, with its pool of connections, for each server, including servers at Unix sockets.

    httpcore looks through all connections of a pool at each request. One pool for all servers, with three calls to each
    of a hundred nodes, took 40 % of a core.
    """

    def __init__(self) -> None:
        self._transports: dict[_Origin, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends the request over the transport of its server. Raises ``httpx.HTTPError`` for all that the server does
        wrong."""
        socket_path: str | None = None
        origin = _find_origin(request.url)
        unix_parts = parse_unix_url(request.url)
        if unix_parts is not None:
            socket_path, request_path = unix_parts
            # The transport of this origin connects to the socket, so the request gets an ordinary URL.
            request.url = httpx.URL(f"{request.url.scheme}://localhost{request_path}")
            if request.headers.get("Host") == "unix":  # set by httpx, from the URL
                request.headers["Host"] = "localhost"
        transport = self._transports.get(origin)
        if transport is None:
            transport = self._transports[origin] = _create_transport(request.url.scheme, socket_path)
        try:
            response = await transport.handle_async_request(request)
        except (AttributeError, OSError) as error:
            # The connection was reset as soon as it was made. A tunnel does so if there is no server at its far end.
            # anyio then asks a closed socket for its peer, and httpx does not translate that error.
            raise httpx.ConnectError("connection reset by peer", request=request) from error
        if "Location" in response.headers and not _is_valid_redirect(request.url, response.headers["Location"]):
            del response.headers["Location"]  # so that httpx does not parse it; the rest of the answer is good
        return response

    async def forget(self, origin: _Origin) -> None:
        """Closes the connections to this server. The next request makes new ones."""
        transport = self._transports.pop(origin, None)
        if transport is not None:
            await transport.aclose()

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()


def _find_origin(url: httpx.URL) -> _Origin:
    unix_parts = parse_unix_url(url)
    return (url.scheme, url.host, url.port) if unix_parts is None else (url.scheme, unix_parts[0], None)


async def forget_servers(client: httpx.AsyncClient, urls: Iterable[str]) -> None:
    """Closes the connections of a client from ``make_http_client`` to servers that are gone: httpx would keep them,
    because it looks at a server's connections only at the next request to it."""
    transport = client._transport
    if isinstance(transport, _TransportPerServer):
        for url in urls:
            await transport.forget(_find_origin(httpx.URL(url)))
