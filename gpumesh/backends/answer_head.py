"""What is believed and kept of the head of a backend's answer. Pure; a host's head is hostile until it was read here.

A host may say anything in its answer's head: that a browser shall run the body as a page, keep a cookie, follow it to
another place, ask its user for a password. An inference server needs none of that. So an allow-list decides: a few
media types, the headers that clients of Ollama, OpenAI and Anthropic read, and statuses that are an answer. Everything
else of the head ends here, for clients of the gateway and of the library alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from gpumesh.printable import printable

OCTETS = "application/octet-stream"  # no browser shows it or runs it
MAX_TYPE = 200  # bytes of a Content-Type
MAX_HEADERS = 32  # kept of one answer

# As what each media type is handed on. Subtitles are text; the old names of JSON are JSON.
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

# What clients read: when to try again, how much is left, and the name of a request in its server's own log.
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
    """``media_type`` is empty where there is none; ``headers`` are those for a client, with a Content-Type of our own
    making. ``problem``: why this is no answer of an inference server, in a sentence about "it"."""

    media_type: str
    headers: tuple[tuple[str, str], ...]
    problem: str | None


class MediaType(NamedTuple):
    """``name`` is the type alone, ``header`` what a Content-Type says."""

    name: str
    header: str


def read_head(status: int, fields: Iterable[tuple[bytes, bytes]], *, empty: bool) -> AnswerHead:
    """``empty``: no body follows, so that its type does not matter."""
    kept: dict[str, str] = {}
    given: bytes | None = None
    encoding = b""
    problem = None
    for raw_name, value in fields:
        lower = raw_name.lower()
        if lower == b"content-type":
            if given is not None and read_media_type(given) != read_media_type(value):
                problem = f"it answered {status} with two media types, of which one must be wrong"
            given = value
        elif lower == b"content-encoding":
            encoding = value
        else:
            name = _HEADERS.get(lower)
            if name is None and lower.startswith(_PREFIXES) and _NAME.fullmatch(lower):
                name = lower.decode()
            if name is not None and len(kept) < MAX_HEADERS and _VALUE.fullmatch(value):
                kept.setdefault(name, value.decode())
    media_type = None if given is None else read_media_type(given)
    if not (200 <= status < 300 or 400 <= status < 600):
        problem = f"it answered {status}, as no inference server does"
    elif encoding and encoding.strip().lower() != b"identity":
        problem = f"it answered {status} with a packed body ({_shown(encoding)}), which nobody asked for"
    elif given is not None and media_type is None and not empty:
        problem = f"it answered {status} with {_shown(given)}, which is no answer of an inference server"
    if problem is not None:
        return AnswerHead("", tuple(kept.items()), problem)
    if media_type is not None:
        return AnswerHead(media_type.name, (("Content-Type", media_type.header), *kept.items()), None)
    return AnswerHead("", tuple(kept.items()) if empty else (("Content-Type", OCTETS), *kept.items()), None)


def read_media_type(value: bytes) -> MediaType | None:
    """What a Content-Type is handed on as; ``None`` for what is none, and for what no inference server answers with."""
    return _read_media_type(value) if len(value) <= MAX_TYPE else None


@lru_cache(maxsize=128)
def _read_media_type(value: bytes) -> MediaType | None:
    """Piece by piece: one pattern for all of it would be tried in a number of ways that doubles with each blank."""
    first, *rest = (piece.strip(b" \t") for piece in value.split(b";"))
    match = _TYPE.fullmatch(first.lower())
    if match is None:
        return None
    kind, given = match[1], match[0].decode()
    name = given if kind == b"audio" else _MEDIA_TYPES.get(given)
    if name is None:
        return None
    parameters = ""
    for piece in filter(None, rest):
        parameter = _PARAMETER.fullmatch(piece)
        if parameter is None:
            return None
        key, plain = parameter[1].decode().lower(), (parameter[2] or parameter[3] or b"").decode()
        if key == "charset":
            if plain.lower() in _CHARSETS and not parameters:
                parameters = f"; charset={plain.lower()}"
        elif kind == b"audio" and parameter[2]:  # the rate and the channels of raw samples
            parameters += f"; {key}={plain}"
    return MediaType(name, name + parameters)


def _shown(value: bytes) -> str:
    return printable(value, 60) or "an empty Content-Type"
