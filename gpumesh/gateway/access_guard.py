"""Who may talk to the gateway at all. Pure.

Host is checked against DNS rebinding as Ollama does it (facts/ollama-api.md, "Host and Origin"): a page in a browser
can make its own name resolve to 127.0.0.1, but it cannot make the browser send another Host. Origins that no allow-list
names may not read answers (no CORS header), and may not send anything that changes something.

A browser says what a page wants an answer for (Fetch Metadata, https://www.w3.org/TR/fetch-metadata/), and no page can
change that. Programs in a page ask by ``fetch()``. All else that a page can ask for is to be shown, embedded or run as
part of some page. What a host answers must never be that: it would be a page of this origin, which may do whatever the
gateway's own page may.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

_APPLICATIONS = frozenset({"app", "file", "tauri", "vscode-file", "vscode-webview"})  # as Ollama has it
_HERE = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::1"})  # noqa: S104  # what a page says, not what we bind
_PORTS = {"http": 80, "https": 443}
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


@dataclass(frozen=True, slots=True)
class Guard:
    """``api_key`` ``None``: nobody needs one. ``hostnames``: names beyond the local ones under which it is reached."""

    api_key: bytes | None
    origins: frozenset[str]
    hostnames: frozenset[str] = frozenset()

    def host_allowed(self, host: str | None) -> bool:
        """With a key asked for, rebinding gains nothing: a page does not know the key."""
        if self.api_key is not None:
            return True
        if not host:
            return False
        return _is_local(host) or _name(host) in self.hostnames

    def origin_allowed(
        self, origin: str | None, *, host: str | None = None, backend_ports: Collection[int] = ()
    ) -> bool:
        """No Origin: not a browser's cross-site request. Pages of this machine itself are let in, as Ollama does, and
        applications on it whose pages are no web pages. So is the gateway's own page, which was opened under this
        ``host`` (the Host header): by an address, which cannot be rebound, or where a key is asked for. A page behind
        one of ``backend_ports`` is only seemingly of this machine: the port is the end of a tunnel, and its host wrote
        the page."""
        if origin is None or origin in self.origins or "*" in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            if parts.scheme in _APPLICATIONS:
                return True
            proven = host is not None and (self.api_key is not None or _address(_name(host)) is not None)
            if host and proven and parts.scheme in _PORTS and parts.netloc == host.lower():
                return True
            return parts.hostname in _HERE and (parts.port or _PORTS.get(parts.scheme)) not in backend_ports
        except ValueError:  # brackets without an address in them, a port that is none
            return False

    def cors_headers(self, origin: str, headers: Mapping[str, str]) -> dict[str, str]:
        """What every answer says to a browser whose page has this origin, which is allowed; a preflight's too."""
        told = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers") or "*, Authorization",
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
            "Access-Control-Expose-Headers": "X-GPUMesh-Node, X-GPUMesh-Attempts, X-GPUMesh-Queue-Ms, X-Request-Id",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }
        if headers.get("Access-Control-Request-Private-Network") == "true":
            told["Access-Control-Allow-Private-Network"] = "true"  # a page of the web asks for this machine
        return told

    def key_allowed(self, headers: Mapping[str, str]) -> bool:
        """Either header will do: some clients send both, and only one of them is ours. Takes the same time whatever
        the key is."""
        if self.api_key is None:
            return True
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        bearer = value.strip() if scheme.lower() == "bearer" else ""
        same = [self._same(headers.get("x-api-key", "")), self._same(bearer)]
        return any(same)

    def _same(self, given: str) -> bool:
        assert self.api_key is not None
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.api_key)


def is_embedding_request(headers: Mapping[str, str], *, is_own_page: bool) -> bool:
    """Whether a browser asks for this to show, embed or run it. ``is_own_page``: it is a page of ours, which may be
    shown, though not in a frame. Browsers say so to loopback and over HTTPS; other programs do not say anything."""
    destination = headers.get("Sec-Fetch-Dest")
    if destination is not None and destination != "empty" and not (is_own_page and destination == "document"):
        return True
    return headers.get("Service-Worker") is not None


def is_blind_cross_site_request(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site asks without a name, as ``fetch(…, {mode: "no-cors"})``, a prefetch or a link do.
    It could not read the answer, yet it would have made the request."""
    return headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and headers.get("Origin") is None


@lru_cache(maxsize=256)
def _is_local(host: str) -> bool:
    name = _name(host)
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return True
    address = _address(name)
    return address is not None and (address.is_loopback or address.is_private)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _name(host: str) -> str:
    """The host of a Host header, without its port: ``[::1]:80``, ``127.0.0.1:80``, ``localhost``."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host
