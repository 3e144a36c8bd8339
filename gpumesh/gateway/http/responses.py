"""Header fields, whole answers, and the rendering of an answer's head. Pure, except for the clock in ``Date``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

HeaderPairs = tuple[tuple[str, str], ...]
"""The name and the value of each header field."""

# ``render_head`` renders these itself. A handler's own fields of these names are dropped: they come from the connection
# to a node and do not hold for the connection to the client.
_OWN_HEADERS = frozenset({"server", "date", "connection", "keep-alive", "content-length", "transfer-encoding"})
_BODILESS_STATUSES = frozenset({204, 304})  # RFC 9110: no content, not modified

# The Content-Security-Policy of every answer except the gateway's own page: a browser that shows such an answer must
# not run or load anything in it.
SANDBOX = "sandbox; default-src 'none'; frame-ancestors 'none'"
# Browsers take the type of an answer from its head and do not guess. The page of another site may load an answer only
# if CORS allows it, and may not show it in a frame. A link in an answer does not tell the answer's address.
_BROWSER_HEADERS = (
    "X-Content-Type-Options: nosniff\r\n"
    "X-Frame-Options: DENY\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\n"
    "Referrer-Policy: no-referrer\r\n"
)


class Headers(dict[str, str]):
    """Header fields by their names in lower case. If a name occurs several times, its first value counts. ``pairs``:
    all fields as they came."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: HeaderPairs) -> None:
        self.pairs = pairs
        super().__init__({name.lower(): value for name, value in reversed(pairs)})


class Response:
    """A whole answer. ``close``: the connection ends after this answer."""

    __slots__ = ("body", "close", "content_security_policy", "headers", "status")

    def __init__(
        self,
        body: bytes = b"",
        *,
        status: int = 200,
        content_type: str | None = None,
        headers: HeaderPairs = (),
        close: bool = False,
        content_security_policy: str = SANDBOX,
    ) -> None:
        self.body = body
        self.content_security_policy = content_security_policy
        self.status = status
        self.close = close
        self.headers = headers if content_type is None else (("Content-Type", content_type), *headers)


def json_response(body: bytes, *, status: int = 200, headers: HeaderPairs = (), close: bool = False) -> Response:
    """Makes an answer of a body that is JSON."""
    return Response(body, status=status, content_type="application/json", headers=headers, close=close)


ErrorRenderer = Callable[[int, str], Response]
"""The type of the function that makes an error's answer from a status and a message, when there is no request."""


def plain_error(status: int, message: str) -> Response:
    """Makes an error's answer as plain text."""
    return Response(f"{message}\n".encode(), status=status, content_type="text/plain; charset=utf-8")


def has_no_body(method: str, status: int) -> bool:
    """Whether an answer to this method with this status has no body, even if its head announces one."""
    return method == "HEAD" or status in _BODILESS_STATUSES


def render_head(
    status: int,
    headers: Iterable[tuple[str, str]],
    *,
    length: int | None,
    keep_alive: bool,
    is_http10: bool,
    content_security_policy: str = SANDBOX,
) -> bytes:
    """Renders an answer's head, with the empty line after it. ``keep_alive``: the connection stays after the answer.

    ``length`` is the number of bytes of the body. If it is ``None``, the body is chunked; but for a client of HTTP/1.0
    (``is_http10``) it ends with the connection. Raises ValueError if a header contains a line end.
    """
    lines = [_render_date(int(time.time()))]
    lines += [f"{name}: {value}" for name, value in headers if not _is_own(name)]
    if length is None:
        if not is_http10 and status not in _BODILESS_STATUSES:
            lines.append("Transfer-Encoding: chunked")
    elif status not in _BODILESS_STATUSES:
        lines.append(f"Content-Length: {length}")
    if not keep_alive:
        lines.append("Connection: close")
    elif is_http10:
        lines.append("Connection: keep-alive")
    text = "\r\n".join(lines)
    # The only line ends are those between the lines; otherwise a header could add a line of its own.
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a line end inside of a header")
    return _render_first_lines(status, content_security_policy) + text.encode("utf-8", "surrogateescape") + b"\r\n\r\n"


@lru_cache(maxsize=128)
def _render_first_lines(status: int, policy: str) -> bytes:
    """Renders the lines that are the same in all answers with this status and policy."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:  # a status without a standard meaning
        phrase = "Unknown"
    lines = f"HTTP/1.1 {status} {phrase}\r\nServer: gpumesh\r\nContent-Security-Policy: {policy}\r\n{_BROWSER_HEADERS}"
    return lines.encode()


@lru_cache(maxsize=256)
def _is_own(name: str) -> bool:
    """Whether ``render_head`` renders the header of this name itself."""
    return name.lower() in _OWN_HEADERS


@lru_cache(maxsize=2)
def _render_date(now: int) -> str:
    """The ``Date`` of an answer. ``now`` is in seconds of Unix time, so a line is used again for a second."""
    return f"Date: {formatdate(now, usegmt=True)}"
