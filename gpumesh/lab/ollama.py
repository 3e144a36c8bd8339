"""A stand-in for Ollama: its native API and its /v1, its check of Host and Origin, and the form of its errors.

It behaves as Ollama's source says (``docs/internals/ollama.md``). Its version shows that it is a stand-in.
"""

from __future__ import annotations

import contextlib
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from gpumesh.lab.profile import HostProfile
from gpumesh.lab.servers import native_routes, v1_routes
from gpumesh.lab.servers.server import SimServer


class SimOllama(SimServer):
    """One simulated Ollama server. ``blobs`` are the digests of the files that clients have uploaded."""

    def __init__(self, profile: HostProfile, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(profile, host=host, port=port)
        self.blobs: set[str] = set()

    def add_routes(self, app: web.Application) -> None:
        native_routes.add_routes(app, self, self.blobs)
        v1_routes.add_routes(app, self)

    def find_refusal(self, request: web.Request) -> web.Response | None:
        """Returns status 403, without a body, for a foreign Host or Origin: an Ollama on loopback does so."""
        host_name = urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
        if not _is_local_name(host_name, self.profile.hostname):
            return web.Response(status=403)
        origin = request.headers.get("Origin")
        if origin is not None and not _is_local_origin(origin):
            return web.Response(status=403)
        return None


def _is_local_name(name: str, own_name: str) -> bool:
    """Whether Ollama accepts this Host header: a local address or name, or ``own_name``, the name of its machine."""
    with contextlib.suppress(ValueError):  # the text is a name, not an address
        address = ipaddress.ip_address(name)
        return address.is_loopback or address.is_private or address.is_unspecified
    # "": the request has no Host header.
    return name in ("", "localhost", own_name.lower()) or name.endswith((".localhost", ".local", ".internal"))


def _is_local_origin(origin: str) -> bool:
    """Whether Ollama accepts this Origin header: a page of this machine, or of a desktop application."""
    parts = urlsplit(origin)
    if parts.scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file"):
        return True
    return parts.scheme in ("http", "https") and parts.hostname in ("localhost", "127.0.0.1", "::1")
