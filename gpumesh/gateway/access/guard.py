"""``Guard`` decides which requests the gateway answers at all, by their Host, Origin and key. Pure.

The Host header is checked against DNS rebinding, as Ollama does it (docs/internals/ollama.md). A page in a browser can
make its own name resolve to 127.0.0.1, but it cannot make the browser send another Host. A page whose origin is on no
allow-list may not read answers (they have no CORS header), and may not send requests that change something.

A browser tells for which purpose a page requests an answer (Fetch Metadata, https://www.w3.org/TR/fetch-metadata/), and
no page can change that. An answer to ``fetch()`` goes to a script of the page. Any other answer is shown, embedded or
run as a part of some page. The browser must never show, embed or run the answer of a node's host: for the browser it
would be a page of the gateway's origin, and could do everything that the gateway's own page can do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from gpumesh.gateway.access.api_keys import ApiKeys
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request

_APPLICATION_SCHEMES = frozenset({"app", "file", "tauri", "vscode-file", "vscode-webview"})  # Ollama's list
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::1"})  # noqa: S104  # hosts of an Origin, not to bind
_DEFAULT_PORTS = {"http": 80, "https": 443}
# The headers that only browsers send. Each check of a request's purpose and origin reads some of these and no others.
_BROWSER_HEADERS = frozenset({"origin", "service-worker", "sec-fetch-dest", "sec-fetch-site"})
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules of one gateway.

    - ``keys``: the keys of clients; ``None`` if no key is needed.
    - ``origins``: the origins of mesh.yaml whose pages may send requests; ``*`` stands for every origin.
    - ``hostnames``: the names under which clients may reach the gateway, in addition to the local names. In lower case.
    """

    keys: ApiKeys | None
    origins: frozenset[str]
    hostnames: frozenset[str] = frozenset()

    @property
    def key_names(self) -> frozenset[str]:
        """The names of the holders of keys."""
        return frozenset() if self.keys is None else self.keys.names

    # -- checks of a request -------------------------------------------------------------------------------------

    def require_allowed_source(
        self, request: Request, *, is_own_page: bool, backend_ports: Callable[[], Collection[int]]
    ) -> None:
        """Raises BadRequest unless a request with this Host, Origin and purpose is allowed. Sets the request's CORS
        headers if it has an Origin.

        ``is_own_page``: the request asks for the gateway's own page. ``backend_ports`` returns the ports of this
        machine on which nodes' servers answer (``Fleet.local_ports``): pages from there are not trusted."""
        headers = request.headers
        origin, host = headers.get("origin"), headers.get("host")
        if not self.host_allowed(host):
            message = "this Host is not served here: ask for localhost or an IP address, or set gateway.api_key_env"
            raise BadRequest(message, status=403)
        if _BROWSER_HEADERS.isdisjoint(headers):  # nearly all requests: they do not come from a browser
            return
        if is_request_to_render(headers, is_own_page=is_own_page):
            message = (
                "a browser may ask for this by fetch() only, not show, embed or run it; the page for people is at /ui"
            )
            raise BadRequest(message, status=403)
        if origin is None:
            if is_blind_cross_site_request(headers) and not is_own_page:  # other sites may link to the own page
                raise BadRequest("a page of another site may ask here by CORS only", status=403)
            return
        if not self.origin_allowed(origin, host=host, backend_ports=backend_ports()):
            raise BadRequest("this Origin is not in gateway.cors_origins of mesh.yaml", status=403)
        request.cors = self.cors_headers(origin, headers)

    def require_key(self, headers: Mapping[str, str]) -> ClientKey | None:
        """The key that the client sends; ``None`` if no key is needed. Raises BadRequest if a key is needed and the
        client has sent no key, or a key that this gateway does not know."""
        if self.keys is None:
            return None
        key = self.keys.find(headers)
        if key is None:
            raise BadRequest("an API key is needed: Authorization: Bearer … or x-api-key", status=401)
        return key

    # -- the rules -----------------------------------------------------------------------------------------------

    def host_allowed(self, host: str | None) -> bool:
        """Whether the Host header may have this value. With a key any Host is allowed: DNS rebinding gives a page
        nothing, because the page does not know the key."""
        if self.keys is not None:
            return True
        if not host:
            return False
        return _is_local_name(host) or _strip_port(host) in self.hostnames

    def origin_allowed(
        self, origin: str | None, *, host: str | None = None, backend_ports: Collection[int] = ()
    ) -> bool:
        """Whether a page of this origin may send requests. ``None`` is allowed: it stands for a request without an
        Origin, which no page of another site sends in a way that it could read the answer.

        - The origins of mesh.yaml are allowed.
        - Pages of this machine are allowed, as Ollama allows them, but not from ``backend_ports``: a page from such a
          port was written by a node's host.
        - Applications whose pages are no web pages (``app://`` …) are allowed.
        - The gateway's own page is allowed: its origin equals ``host`` (the Host header). The host must be an address,
          because DNS rebinding can change where a name leads. If a key is set, the host may also be a name: the page of
          an attacker does not know the key."""
        if origin is None or origin in self.origins or "*" in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            if parts.scheme in _APPLICATION_SCHEMES:
                return True
            if self._is_own_origin(parts.scheme, parts.netloc, host):
                return True
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
            return parts.hostname in _THIS_MACHINE and port not in backend_ports
        except ValueError:  # no valid origin: brackets without an address in them, a port that is no number
            return False

    def _is_own_origin(self, scheme: str, netloc: str, host: str | None) -> bool:
        """Whether the gateway's own page has this origin, if the request has this Host header."""
        if not host:
            return False
        is_web_page = scheme in _DEFAULT_PORTS
        origin_is_host = netloc == host.lower()
        # DNS rebinding needs a name, so an address is safe. With a key, rebinding gains nothing.
        host_is_trusted = _parse_address(_strip_port(host)) is not None or self.keys is not None
        return is_web_page and origin_is_host and host_is_trusted

    def cors_headers(self, origin: str, headers: Mapping[str, str]) -> dict[str, str]:
        """The CORS fields of every answer to a page of this allowed origin, also of the answer to a preflight."""
        fields = {
            "Access-Control-Allow-Origin": origin,
            # A preflight names the headers for which it asks, and gets these. Any other request gets all headers; "*"
            # does not cover Authorization.
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers") or "*, Authorization",
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
            "Access-Control-Expose-Headers": "X-GPUMesh-Node, X-GPUMesh-Model, X-GPUMesh-Attempts, X-GPUMesh-Queue-Ms, "
            "X-GPUMesh-Why, X-GPUMesh-Error, X-Request-Id",
            "Access-Control-Max-Age": "600",  # seconds in which the browser need not send another preflight
            "Vary": "Origin",
        }
        if headers.get("access-control-request-private-network") == "true":
            # Before a page from the internet may send a request to a private address, browsers ask for this permission.
            fields["Access-Control-Allow-Private-Network"] = "true"
        return fields


def is_request_to_render(headers: Mapping[str, str], *, is_own_page: bool) -> bool:
    """Whether a browser would show, embed or run the answer, although it must not. ``is_own_page``: the request asks
    for the gateway's own page, which may be shown, but not in a frame. Browsers send the headers that tell it to
    loopback addresses and over HTTPS; other programs do not send them."""
    if headers.get("service-worker") is not None:  # the script of a service worker, which the browser would run
        return True
    destination = headers.get("sec-fetch-dest", "empty")  # no header: no browser, or plain HTTP to another machine
    if is_own_page and destination == "document":  # shown in a tab of its own, not in a frame
        return False
    return destination != "empty"  # "empty" is what fetch() sends


def is_blind_cross_site_request(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site sends a request without an Origin: ``fetch(…, {mode: "no-cors"})``, a prefetch or
    a link. The page could not read the answer, but the request would have its effect."""
    if headers.get("origin") is not None:
        return False
    site = headers.get("sec-fetch-site", "none")  # "none": typed by a person; no header: no browser, or plain HTTP
    return site not in ("none", "same-origin")  # "cross-site", or "same-site": another origin with a related name


@lru_cache(maxsize=256)
def _is_local_name(host: str) -> bool:
    """Whether a Host header names this machine, or a machine of a private network, by a local name or by its address.
    A page from the internet cannot have such a name, so it cannot use DNS rebinding."""
    name = _strip_port(host)
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return True
    address = _parse_address(name)
    return address is not None and (address.is_loopback or address.is_private)


def _parse_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that the text is; ``None`` if it is a name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _strip_port(host: str) -> str:
    """The host of a Host header, without port and brackets. The header looks like ``[::1]:80``, ``127.0.0.1:80`` or
    ``localhost``."""
    host = host.strip().lower()
    if host.startswith("["):
        address, _, _ = host[1:].partition("]")
        return address
    if host.count(":") > 1:  # an IPv6 address without brackets, so without a port
        return host
    name, _, _ = host.partition(":")
    return name
