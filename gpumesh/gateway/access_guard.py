"""``Guard``: which requests the gateway answers at all, by their Host, Origin and key. Pure.

The Host header is checked against DNS rebinding, as Ollama does it (docs/internals/ollama.md). A page in a browser can
make its own name resolve to 127.0.0.1, but it cannot make the browser send another Host. A page whose origin is on no
allow-list may not read answers (they have no CORS header), and may not send requests that change something.

A browser tells for what a page wants an answer (Fetch Metadata, https://www.w3.org/TR/fetch-metadata/), and no page
can change that. A program in a page asks with ``fetch()``. Everything else that a page can ask for is shown, embedded
or run as a part of some page. What a host answers must never be used so: it would be a page of the gateway's origin,
which may do whatever the gateway's own page may do.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request

_APPLICATION_SCHEMES = frozenset({"app", "file", "tauri", "vscode-file", "vscode-webview"})  # Ollama's list
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::1"})  # noqa: S104  # in an Origin; we bind no such
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


@dataclass(frozen=True, slots=True)
class Guard:
    """``api_key`` ``None``: no key is needed. ``hostnames``: names besides the local ones under which clients reach the
    gateway."""

    api_key: bytes | None
    origins: frozenset[str]
    hostnames: frozenset[str] = frozenset()

    # -- checks of a request -------------------------------------------------------------------------------------

    def require_allowed_source(
        self, request: Request, *, is_own_page: bool, backend_ports: Callable[[], Collection[int]]
    ) -> None:
        """Raises BadRequest unless a client under this Host and Origin may ask. Sets the request's CORS headers.

        ``is_own_page``: the request asks for the gateway's own page."""
        headers = request.headers
        origin, host = headers.get("Origin"), headers.get("Host")
        if not self.host_allowed(host):
            message = "this Host is not served here: ask for localhost or an IP address, or set gateway.api_key_env"
            raise BadRequest(message, status=403)
        if is_embedding_request(headers, is_own_page=is_own_page):
            message = (
                "a browser may ask for this by fetch() only, not show, embed or run it; the page for people is at /ui"
            )
            raise BadRequest(message, status=403)
        if origin is None:
            if not is_own_page and is_blind_cross_site_request(headers):
                raise BadRequest("a page of another site may ask here by CORS only", status=403)
        elif not self.origin_allowed(origin, host=host, backend_ports=backend_ports()):
            raise BadRequest("this Origin is not in gateway.cors_origins of mesh.yaml", status=403)
        else:
            request.cors = self.cors_headers(origin, headers)

    def require_key(self, headers: Mapping[str, str]) -> None:
        """Raises BadRequest unless the client has sent the key, if one is needed."""
        if not self.key_allowed(headers):
            raise BadRequest("an API key is needed: Authorization: Bearer … or x-api-key", status=401)

    # -- the rules -----------------------------------------------------------------------------------------------

    def host_allowed(self, host: str | None) -> bool:
        """Where a key is needed any Host will do: rebinding gains a page nothing, because it does not know the key."""
        if self.api_key is not None:
            return True
        if not host:
            return False
        return _is_local(host) or _strip_port(host) in self.hostnames

    def origin_allowed(
        self, origin: str | None, *, host: str | None = None, backend_ports: Collection[int] = ()
    ) -> bool:
        """Whether a page of this origin may ask. A request without an Origin is no cross-site request of a browser.

        Pages of this machine are allowed, as Ollama allows them, and so are applications whose pages are no web pages.
        The gateway's own page is allowed if it was opened under this ``host`` (the Host header): by an address, which
        cannot be rebound, or where a key is needed. A page behind one of ``backend_ports`` only seems to be of this
        machine: the port is the end of a tunnel, and the page was written by the tunnel's host."""
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
        except ValueError:  # brackets without an address in them, a port that is no number
            return False

    def _is_own_origin(self, scheme: str, netloc: str, host: str | None) -> bool:
        if not host or scheme not in _DEFAULT_PORTS or netloc != host.lower():
            return False
        return self.api_key is not None or _parse_address(_strip_port(host)) is not None

    def cors_headers(self, origin: str, headers: Mapping[str, str]) -> dict[str, str]:
        """The CORS fields of every answer, a preflight's too, to a page of this origin, which is allowed."""
        fields = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers") or "*, Authorization",
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
            "Access-Control-Expose-Headers": "X-GPUMesh-Node, X-GPUMesh-Attempts, X-GPUMesh-Queue-Ms, X-Request-Id",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }
        if headers.get("Access-Control-Request-Private-Network") == "true":
            fields["Access-Control-Allow-Private-Network"] = "true"  # a page of the web asks for this machine
        return fields

    def key_allowed(self, headers: Mapping[str, str]) -> bool:
        """Either header will do: some clients send both, and only one of them holds our key. The check takes the same
        time whatever the key is."""
        if self.api_key is None:
            return True
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        bearer = value.strip() if scheme.lower() == "bearer" else ""
        matches = [self._is_key(headers.get("x-api-key", "")), self._is_key(bearer)]
        return any(matches)

    def _is_key(self, given: str) -> bool:
        assert self.api_key is not None
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.api_key)


def is_embedding_request(headers: Mapping[str, str], *, is_own_page: bool) -> bool:
    """Whether a browser wants to show, embed or run the answer. ``is_own_page``: the answer is a page of ours, which
    may be shown, though not in a frame. Browsers send these headers to loopback and over HTTPS; other programs do
    not."""
    destination = headers.get("Sec-Fetch-Dest")
    if destination is not None and destination != "empty" and not (is_own_page and destination == "document"):
        return True
    return headers.get("Service-Worker") is not None


def is_blind_cross_site_request(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site asks without an Origin: ``fetch(…, {mode: "no-cors"})``, a prefetch or a link. The
    page could not read the answer, but the request would have its effect."""
    return headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and headers.get("Origin") is None


@lru_cache(maxsize=256)
def _is_local(host: str) -> bool:
    name = _strip_port(host)
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return True
    address = _parse_address(name)
    return address is not None and (address.is_loopback or address.is_private)


def _parse_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _strip_port(host: str) -> str:
    """The host of a Host header, without its port: ``[::1]:80``, ``127.0.0.1:80``, ``localhost``."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host
