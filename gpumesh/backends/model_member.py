"""Replaces the model's name in the body of a request, for a server that lists the model under another name. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from urllib.parse import quote, unquote_plus

import msgspec

from gpumesh.backends.body_pieces import Piece
from gpumesh.backends.json_scanner import JsonScanner, MalformedJson

# The usual body: its first member is the model.
_LEADING_MODEL = re.compile(rb'\s*\{\s*"model"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)
# The usual form: its first part is the model. The gateway writes it so (``gateway/body_parsers/form_data.py``).
_LEADING_MODEL_PART = re.compile(
    rb'(--[^\r\n]{1,72}\r\nContent-Disposition: form-data; name="model"\r\n\r\n)([^\r\n]*)\r\n--'
)
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode


def replace_model(body: bytes, name: str) -> list[Piece] | None:
    """The pieces of a body like ``body``, but with this model.

    ``None`` if ``body`` is to be sent as it is: it names this model already, or it is no JSON object that names a
    model. The model should be the first member. If it is not, the whole body is parsed: use ``scan_model`` for a long
    body. A form is changed only if its first part is the model.
    """
    if begins_with_model(body):
        return _replace_first(body, name)
    try:
        members = _decode_members(body)
    except (ValueError, RecursionError):  # no JSON object, or nested too deeply: the server will answer with an error
        return None
    if "model" not in members or _is_name(bytes(members["model"]), name):
        return None
    others = [json.dumps(key).encode() + b":" + bytes(value) for key, value in members.items() if key != "model"]
    return [_render_model(name), b"".join(b"," + other for other in others) + b"}"]


def begins_with_model(body: bytes) -> bool:
    """Whether the name of the model stands at the beginning, where it is found at once. So the gateway writes it."""
    return _LEADING_MODEL_PART.match(body) is not None or _LEADING_MODEL.match(body) is not None


def scan_model(body: bytes, name: str) -> Generator[None, None, list[Piece] | None]:
    """The same pieces as ``replace_model`` makes, in short steps, for a JSON body of any length. It yields after each
    step, and returns the pieces."""
    if begins_with_model(body):
        return _replace_first(body, name)
    try:
        pairs, written_names = yield from JsonScanner(body).scan_members()
    except MalformedJson:  # the server will answer with an error
        return None
    values = [value for key, value in pairs if key == "model"]
    if not values or _is_name(bytes(values[-1]), name):
        return None
    pieces: list[Piece] = [_render_model(name)]
    for (key, value), written_name in zip(pairs, written_names, strict=True):
        if key != "model":
            pieces += (b",", written_name, b":", value)
    return [*pieces, b"}"]


def replace_in_query(path: str, name: str) -> str | None:
    """The path with ``name`` as the model in its query; ``None`` if the query names this model already, or no model."""
    route, question_mark, query = path.partition("?")
    pairs = query.split("&")
    places = [index for index, pair in enumerate(pairs) if is_model_pair(pair)]
    if len(places) != 1 or unquote_plus(pairs[places[0]].partition("=")[2]) == name:
        return None
    pairs[places[0]] = f"model={quote(name, safe='')}"
    return f"{route}{question_mark}{'&'.join(pairs)}"


def scan_names_model(body: bytes) -> Generator[None, None, bool]:
    """Whether the body, which has a form of ``replace_model``, names a model. Yields after each step, as
    ``scan_model``."""
    if begins_with_model(body):
        return True
    try:
        pairs, _ = yield from JsonScanner(body).scan_members()
    except MalformedJson:
        return False
    return any(key == "model" for key, _ in pairs)


def is_model_pair(pair: str) -> bool:
    """Whether this part of a query names the model."""
    return unquote_plus(pair.partition("=")[0]) == "model"


def _replace_first(body: bytes, name: str) -> list[Piece] | None:
    """The pieces for a body that begins with the model."""
    form_match = _LEADING_MODEL_PART.match(body)
    if form_match is not None:
        if form_match[2] == name.encode():
            return None
        return [form_match[1] + name.encode(), memoryview(body)[form_match.end(2) :]]
    match = _LEADING_MODEL.match(body)
    if match is None or _is_name(match[1], name):
        return None
    return [_render_model(name), memoryview(body)[match.end() :]]


def _render_model(name: str) -> bytes:
    """The beginning of a body, with the model as its first member."""
    return b'{"model":' + json.dumps(name).encode()


def _is_name(value: bytes, name: str) -> bool:
    """Whether a value, as it is written in a body, is this name."""
    try:
        return _decode_text(value) == name
    except ValueError:  # no text, or a text that msgspec cannot read
        return False
