"""Reads the head of a backend's answer, and keeps the part of it that clients may get. Pure.

The head comes from a remote host, so it may be hostile: it could make a browser run the body as a page, keep a cookie,
go to another address, or ask its user for a password. An inference server needs none of that. So there is an
allow-list: a few media types, the headers that clients of Ollama, OpenAI and Anthropic read, and the statuses of an
answer. Everything else is dropped here, for clients of the gateway and of the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from gpumesh.text.printable import printable

OCTETS = "application/octet-stream"  # no browser shows it or runs it
MAX_TYPE_BYTES = 200  # a longer Content-Type is not read
MAX_HEADERS = 32  # the client gets at most so many headers of one answer; the rest is dropped

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

CONTENT_TYPE, CONTENT_ENCODING = "Content-Type", "Content-Encoding"
# The headers that clients read: when to try again, the limits that are left, and a request's name in its server's log.
# The first two are read here: clients get a Content-Type of ours, and no Content-Encoding.
_HEADERS = {
    name.lower().encode(): name
    for name in (
        CONTENT_TYPE,
        CONTENT_ENCODING,
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
_HEADER_PREFIXES = (b"x-ratelimit-", b"anthropic-ratelimit-")  # clients read all headers with these
MAX_NAME_BYTES = 64  # a header with a longer name is dropped
_HEADER_NAME = re.compile(rb"[a-z0-9-]+")
_HEADER_VALUE = re.compile(rb"[ -~]{1,256}")  # printable ASCII

_TYPE = re.compile(rb"(?P<main>[a-z0-9!#$&^_.+-]{1,64})/[a-z0-9!#$&^_.+-]{1,64}")
_PARAMETER = re.compile(
    rb"(?P<name>[A-Za-z0-9!#$&^_.+-]{1,64})"
    rb"=(?:(?P<token>[A-Za-z0-9!#$&^_.+-]{1,64})|\"(?P<quoted>[ !#-:<-\[\]-~]{0,64})\")"
)


class AnswerHead(msgspec.Struct, frozen=True):
    """The part of an answer's head that clients may get.

    ``media_type`` is empty if the answer has none. ``headers`` are for the client; their Content-Type was rewritten.
    ``problem``: why this is not an inference server's answer, as a sentence whose subject "it" is the server; ``None``
    if the answer may come from one.
    """

    media_type: str
    headers: tuple[tuple[str, str], ...]
    problem: str | None


class MediaType(NamedTuple):
    """A media type that clients may get: ``name`` is the type alone (``text/plain``), ``header`` the whole Content-Type
    with parameters."""

    name: str
    header: str


def read_head(status: int, fields: Iterable[tuple[bytes, bytes]], *, empty: bool) -> AnswerHead:
    """Returns the part of a head that clients may get, or the problem with it. ``fields`` are the header fields as they
    were received. ``empty``: the answer has no body, so its media type does not matter."""
    client_headers: dict[str, str] = {}
    content_types: list[bytes] = []
    encoding = b""
    for raw_name, value in fields:
        name = _find_client_name(raw_name) if len(raw_name) <= MAX_NAME_BYTES else None
        if name is None:
            continue
        if name is CONTENT_TYPE:
            content_types.append(value)
        elif name is CONTENT_ENCODING:
            encoding = value
        elif len(client_headers) < MAX_HEADERS and _HEADER_VALUE.fullmatch(value):
            client_headers.setdefault(name, value.decode())  # of a header that comes twice, the first value is kept
    headers = tuple(client_headers.items())
    media_type = read_media_type(content_types[-1]) if content_types else None
    is_usual = media_type is not None and len(content_types) == 1 and not encoding and 200 <= status < 300
    problem = None if is_usual else _find_problem(status, content_types, encoding, empty=empty)
    if problem is not None:
        return AnswerHead("", headers, problem)
    if media_type is not None:
        return AnswerHead(media_type.name, ((CONTENT_TYPE, media_type.header), *headers), None)
    if empty:
        return AnswerHead("", headers, None)
    # A body without a Content-Type gets one, because a browser would guess a type.
    return AnswerHead("", ((CONTENT_TYPE, OCTETS), *headers), None)


@lru_cache(maxsize=256)  # a server sends the same names with each answer
def _find_client_name(raw_name: bytes) -> str | None:
    """The name of a header that concerns the client, as the client gets it; ``None`` for all other headers."""
    lower_name = raw_name.lower()
    name = _HEADERS.get(lower_name)
    # A header with one of the prefixes may pass too, under its own name, if that is a plain name.
    if name is None and lower_name.startswith(_HEADER_PREFIXES) and _HEADER_NAME.fullmatch(lower_name):
        name = lower_name.decode()
    return name


def _find_problem(status: int, content_types: Sequence[bytes], encoding: bytes, *, empty: bool) -> str | None:
    """Why these are not the status, the Content-Types and the Content-Encoding of an inference server's answer;
    ``None`` if they may be."""
    is_success_or_error = 200 <= status < 300 or 400 <= status < 600
    if not is_success_or_error:  # a redirect, or a status that HTTP does not have
        return f"it answered {status}, as no inference server does"
    if encoding and encoding.strip().lower() != b"identity":
        return f"it answered {status} with a packed body ({_printable_value(encoding)}), which nobody asked for"
    if not content_types:
        return None
    last_content_type = content_types[-1]
    if read_media_type(last_content_type) is None and not empty:
        shown = _printable_value(last_content_type)
        return f"it answered {status} with {shown}, which is no answer of an inference server"
    has_different_types = len(content_types) > 1 and len(set(map(read_media_type, content_types))) > 1
    if has_different_types:  # the same type twice may pass
        return f"it answered {status} with two media types, of which one must be wrong"
    return None


def read_media_type(value: bytes) -> MediaType | None:
    """The media type that the client gets for this Content-Type. ``None`` if it is broken, or if no inference server
    answers with it."""
    return _parse_media_type(value) if len(value) <= MAX_TYPE_BYTES else None


@lru_cache(maxsize=128)
def _parse_media_type(value: bytes) -> MediaType | None:
    """Does the work of ``read_media_type``, piece by piece. A hostile value could make a pattern for the whole value
    very slow: each further blank would double the number of ways to match."""
    type_piece, *parameter_pieces = (piece.strip(b" \t") for piece in value.split(b";"))
    type_match = _TYPE.fullmatch(type_piece.lower())
    if type_match is None:
        return None
    full_type = type_match[0].decode()
    is_audio = type_match["main"] == b"audio"  # every type of audio may pass: no browser runs it
    name = full_type if is_audio else _MEDIA_TYPES.get(full_type)
    if name is None:
        return None
    parameters = ""
    for piece in filter(None, parameter_pieces):
        match = _PARAMETER.fullmatch(piece)
        if match is None:
            return None
        parameter_name = match["name"].decode().lower()
        parameter_value = (match["token"] or match["quoted"] or b"").decode()
        if parameter_name == "charset":
            if parameter_value.lower() in _CHARSETS and not parameters:  # only a first charset, and only a known one
                parameters = f"; charset={parameter_value.lower()}"
        elif is_audio and match["token"]:  # the rate and the channels of raw samples
            parameters += f"; {parameter_name}={parameter_value}"
    return MediaType(name, name + parameters)


def _printable_value(value: bytes) -> str:
    """The value of a header as a message can show it."""
    return printable(value, 60) or "an empty Content-Type"
