"""Makes and splits URLs of servers at Unix sockets, in nginx's form: ``http://unix:/run/x.sock:/prefix``. Pure."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote


def unix_url(path: Path, *, scheme: str = "http", prefix: str = "") -> str:
    """A base URL. It ends with a colon or with the prefix, so that the path of a request can be appended."""
    return f"{scheme}://unix:{quote(str(path), safe='/')}:{prefix}"


def split_unix_url(url: str) -> tuple[str, str] | None:
    """The socket's path, and the rest of the URL after it (``/api/tags``). ``None`` for a URL of another form."""
    _scheme, _, rest = url.partition("://")
    if not rest.startswith("unix:/"):
        return None
    path, colon, after = rest.removeprefix("unix:").partition(":")
    return (unquote(path), after) if colon else None
