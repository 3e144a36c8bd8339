"""Who may talk to the gateway at all. Pure.

Host is checked against DNS rebinding as Ollama does it (facts/ollama-api.md, "Host and Origin"): a page in a browser
can make its own name resolve to 127.0.0.1, but it cannot make the browser send another Host. Origins that no allow-list
names may not read answers (no CORS header), and may not send anything that changes something.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

_APPLICATIONS = frozenset({"app", "file", "tauri", "vscode-file", "vscode-webview"})  # as Ollama has it
_HERE = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::1"})  # noqa: S104  # what a page says, not what we bind
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

    def origin_allowed(self, origin: str | None) -> bool:
        """No Origin: not a browser's cross-site request. Pages of this machine itself are let in, as Ollama does, and
        applications on it whose pages are no web pages."""
        if origin is None or origin in self.origins or "*" in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            return parts.scheme in _APPLICATIONS or parts.hostname in _HERE
        except ValueError:  # brackets without an address in them
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


@lru_cache(maxsize=256)
def _is_local(host: str) -> bool:
    name = _name(host)
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_private


def _name(host: str) -> str:
    """The host of a Host header, without its port: ``[::1]:80``, ``127.0.0.1:80``, ``localhost``."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host
