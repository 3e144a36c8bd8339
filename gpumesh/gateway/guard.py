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
from urllib.parse import urlsplit

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
        name = _name(host)
        if name == "localhost" or name in self.hostnames or name.endswith(_LOCAL_SUFFIXES):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or address.is_private

    def origin_allowed(self, origin: str | None) -> bool:
        """No Origin: not a browser's cross-site request. Pages of this machine itself are let in, as Ollama does."""
        if origin is None or origin in self.origins or "*" in self.origins:
            return True
        return urlsplit(origin).hostname in ("localhost", "127.0.0.1", "::1")

    def key_allowed(self, headers: Mapping[str, str]) -> bool:
        if self.api_key is None:
            return True
        given = headers.get("x-api-key")
        if given is None:
            scheme, _, value = headers.get("Authorization", "").partition(" ")
            given = value.strip() if scheme.lower() == "bearer" else ""
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.api_key)


def _name(host: str) -> str:
    """The host of a Host header, without its port: ``[::1]:80``, ``127.0.0.1:80``, ``localhost``."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host
