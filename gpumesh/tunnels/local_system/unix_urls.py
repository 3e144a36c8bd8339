"""Makes and splits URLs of servers at Unix sockets, in nginx's form: ``http://unix:/run/x.sock:/prefix``. Pure."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote


def unix_url(path: Path, *, scheme: str = "http", prefix: str = "") -> str:
    """The base URL of a server at a Unix socket. The path of a request can be appended to it."""
    return f"{scheme}://unix:{quote(str(path), safe='/')}:{prefix}"


def split_unix_url(url: str) -> tuple[str, str] | None:
    """Splits a URL into the socket's path and the rest after it (``/api/tags``); ``None`` for a URL of another form."""
    _scheme, _, address = url.partition("://")
    if not address.startswith("unix:/"):
        return None
    socket_path, colon, rest = address.removeprefix("unix:").partition(":")
    if not colon:
        return None
    return unquote(socket_path), rest
