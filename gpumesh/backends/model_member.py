"""Replaces the model's name in the body of a request, for a server that lists the model under another name. Pure."""

from __future__ import annotations

import json
import re
from urllib.parse import quote, unquote_plus

import msgspec

# The usual body: its first member is the model.
_LEADING_MODEL = re.compile(rb'\s*\{\s*"model"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)
# The usual form: its first part is the model. The gateway writes it so (``gateway/form_data.py``).
_LEADING_MODEL_PART = re.compile(
    rb'(--[^\r\n]{1,72}\r\nContent-Disposition: form-data; name="model"\r\n\r\n)([^\r\n]*)\r\n--'
)
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode


def replace_model(body: bytes, name: str) -> tuple[bytes, memoryview] | None:
    """The two parts of a body like ``body``, but with this model: a short new beginning, and the unchanged rest.

    ``None`` if ``body`` is to be sent as it is: it names this model already, or it is no JSON object that names a
    model. The model should be the first member. If it is not, the whole body is parsed, which takes long for a long
    body. A form is changed only if its first part is the model.
    """
    form_match = _LEADING_MODEL_PART.match(body)
    if form_match is not None:
        if form_match[2] == name.encode():
            return None
        return form_match[1] + name.encode(), memoryview(body)[form_match.end(2) :]
    match = _LEADING_MODEL.match(body)
    if match is None:
        return _replace_later_member(body, name)
    if _is_name(match[1], name):
        return None
    return b'{"model":' + json.dumps(name).encode(), memoryview(body)[match.end() :]


def replace_in_query(path: str, name: str) -> str | None:
    """A path with a query like this one, but with this model; ``None`` if it names this model already, or none."""
    route, question_mark, query = path.partition("?")
    pairs = query.split("&")
    places = [index for index, pair in enumerate(pairs) if is_model_pair(pair)]
    if len(places) != 1 or unquote_plus(pairs[places[0]].partition("=")[2]) == name:
        return None
    pairs[places[0]] = f"model={quote(name, safe='')}"
    return f"{route}{question_mark}{'&'.join(pairs)}"


def names_model(body: bytes) -> bool:
    """Whether the body, which has a form of ``replace_model``, names a model."""
    if _LEADING_MODEL_PART.match(body) is not None or _LEADING_MODEL.match(body) is not None:
        return True
    try:
        return "model" in _decode_members(body)
    except (ValueError, RecursionError):
        return False


def is_model_pair(pair: str) -> bool:
    """Whether this part of a query names the model."""
    return unquote_plus(pair.partition("=")[0]) == "model"


def _replace_later_member(body: bytes, name: str) -> tuple[bytes, memoryview] | None:
    """Does the work of ``replace_model`` for a body that does not begin with the model's name."""
    try:
        members = _decode_members(body)
    except (ValueError, RecursionError):  # no JSON object, or nested too deeply: the server will answer with an error
        return None
    if "model" not in members or _is_name(bytes(members["model"]), name):
        return None
    others = [json.dumps(key).encode() + b":" + bytes(value) for key, value in members.items() if key != "model"]
    rest = b"".join(b"," + other for other in others) + b"}"
    return b'{"model":' + json.dumps(name).encode(), memoryview(rest)


def _is_name(value: bytes, name: str) -> bool:
    """Whether a value, as it is written in a body, is this name."""
    try:
        return _decode_text(value) == name
    except ValueError:  # no text, or one that msgspec cannot read
        return False
