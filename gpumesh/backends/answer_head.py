"""Reads the head of a backend's answer, and keeps the part of it that clients may get. Pure.

The head comes from a remote host, so it may be hostile: it could make a browser run the body as a page, keep a cookie,
go to another address, or ask its user for a password. An inference server needs none of that. So there is an
allow-list: a few media types, the headers that clients of Ollama, OpenAI and Anthropic read, and the statuses of an
answer. Everything else is dropped here, for clients of the gateway and of the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from gpumesh.printable import printable

OCTETS = "application/octet-stream"  # no browser shows it or runs it
MAX_TYPE = 200  # bytes of a Content-Type
MAX_HEADERS = 32  # of one answer; more are dropped

# The media types that may pass -> the type that the client gets. Subtitles become text, old names of JSON become JSON.
_MEDIA_TYPES = {
    "application/json": "application/json",
    "text/json": "application/json",
    "application/problem+json": "application/problem+json",
    "application/x-ndjson": "application/x-ndjson",
    "application/ndjson": "application/x-ndjson",
    "application/jsonl": "application/x-ndjson",
    "application/x-jsonlines": "application/x-ndjson",
    "text/event-stream": "text/event-stream",
    "text/plain": "text/plain",
    "text/vtt": "text/plain",
    "text/srt": "text/plain",
    "application/x-subrip": "text/plain",
    OCTETS: OCTETS,
}
_CHARSETS = frozenset({"utf-8", "us-ascii", "iso-8859-1"})

# The headers that clients read: when to try again, the limits that are left, and a request's name in its server's log.
_HEADERS = {
    name.lower().encode(): name
    for name in (
        "Retry-After",
        "Retry-After-Ms",
        "X-Should-Retry",
        "X-Request-Id",
        "Request-Id",
        "OpenAI-Processing-Ms",
        "OpenAI-Version",
        "OpenAI-Organization",
        "OpenAI-Model",
        "Anthropic-Organization-Id",
    )
}
_PREFIXES = (b"x-ratelimit-", b"anthropic-ratelimit-")
_NAME = re.compile(rb"[a-z0-9-]{1,64}")
_VALUE = re.compile(rb"[ -~]{1,256}")

_TYPE = re.compile(rb"([a-z0-9!#$&^_.+-]{1,64})/([a-z0-9!#$&^_.+-]{1,64})")
_PARAMETER = re.compile(rb"([A-Za-z0-9!#$&^_.+-]{1,64})=(?:([A-Za-z0-9!#$&^_.+-]{1,64})|\"([ !#-:<-\[\]-~]{0,64})\")")


class AnswerHead(NamedTuple):
    """``media_type`` is empty where the answer has none. ``headers`` are for the client, with a Content-Type that is
    written here. ``problem``: why this is not an inference server's answer, as a sentence whose subject is "it"."""

    media_type: str
    headers: tuple[tuple[str, str], ...]
    problem: str | None


class MediaType(NamedTuple):
    """``name`` is the type alone (``text/plain``), ``header`` the whole Content-Type with parameters."""

    name: str
    header: str


def read_head(status: int, fields: Iterable[tuple[bytes, bytes]], *, empty: bool) -> AnswerHead:
    """``empty``: the answer has no body, so its media type does not matter."""
    client_headers: dict[str, str] = {}
    content_type: bytes | None = None
    encoding = b""
    problem = None
    for raw_name, value in fields:
        lower = raw_name.lower()
        if lower == b"content-type":
            if content_type is not None and read_media_type(content_type) != read_media_type(value):
                problem = f"it answered {status} with two media types, of which one must be wrong"
            content_type = value
        elif lower == b"content-encoding":
            encoding = value
        else:
            name = _HEADERS.get(lower)
            if name is None and lower.startswith(_PREFIXES) and _NAME.fullmatch(lower):
                name = lower.decode()
            if name is not None and len(client_headers) < MAX_HEADERS and _VALUE.fullmatch(value):
                client_headers.setdefault(name, value.decode())
    media_type = None if content_type is None else read_media_type(content_type)
    if not (200 <= status < 300 or 400 <= status < 600):
        problem = f"it answered {status}, as no inference server does"
    elif encoding and encoding.strip().lower() != b"identity":
        problem = f"it answered {status} with a packed body ({_printable_value(encoding)}), which nobody asked for"
    elif content_type is not None and media_type is None and not empty:
        shown = _printable_value(content_type)
        problem = f"it answered {status} with {shown}, which is no answer of an inference server"
    headers = tuple(client_headers.items())
    if problem is not None:
        return AnswerHead("", headers, problem)
    if media_type is not None:
        return AnswerHead(media_type.name, (("Content-Type", media_type.header), *headers), None)
    return AnswerHead("", headers if empty else (("Content-Type", OCTETS), *headers), None)


def read_media_type(value: bytes) -> MediaType | None:
    """The media type that the client gets for this Content-Type. ``None`` if it is broken, or if no inference server
    answers with it."""
    return _read_media_type(value) if len(value) <= MAX_TYPE else None


@lru_cache(maxsize=128)
def _read_media_type(value: bytes) -> MediaType | None:
    """Matches piece by piece. One pattern for the whole value could be made very slow: each further blank would double
    the number of ways to match."""
    first, *rest = (piece.strip(b" \t") for piece in value.split(b";"))
    match = _TYPE.fullmatch(first.lower())
    if match is None:
        return None
    kind, full_type = match[1], match[0].decode()
    name = full_type if kind == b"audio" else _MEDIA_TYPES.get(full_type)
    if name is None:
        return None
    parameters = ""
    for piece in filter(None, rest):
        parameter = _PARAMETER.fullmatch(piece)
        if parameter is None:
            return None
        key, text = parameter[1].decode().lower(), (parameter[2] or parameter[3] or b"").decode()
        if key == "charset":
            if text.lower() in _CHARSETS and not parameters:
                parameters = f"; charset={text.lower()}"
        elif kind == b"audio" and parameter[2]:  # the rate and the channels of raw samples
            parameters += f"; {key}={text}"
    return MediaType(name, name + parameters)


def _printable_value(value: bytes) -> str:
    return printable(value, 60) or "an empty Content-Type"
