"""Requests that name their model in the query: GETs, and those whose body is a recording or a picture. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote_plus

from gpumesh.backends.model_member import is_model_pair
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.model_requests import ModelRoute

_RAW_TYPES = ("audio/", "video/", "image/", "application/octet-stream")
_BEFORE_JSON = b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n"  # white space, and what UTF-16 and UTF-32 add
_RAW_PATHS = "/v1/audio/"  # the known routes whose body may be no JSON


def read_query_model(target: str) -> str | None:
    """The model that the query names; ``None`` if it names none. Raises BadRequest if it names two."""
    query = target.partition("?")[2]
    values = [pair.partition("=")[2] for pair in query.split("&") if is_model_pair(pair)] if "model" in query else []
    if len(values) > 1:
        raise BadRequest("the query has `model` twice")
    if not values:
        return None
    return unquote_plus(values[0]) or None  # a name without text names no model


def may_be_raw(route: ModelRoute, path: str, headers: Mapping[str, str], model: str | None) -> bool:
    """Whether a body that is no JSON may be for the server as it is. ``model``: the one that the query names. Without
    it the request must say that its body is a recording or a picture."""
    if route.is_known and not path.startswith(_RAW_PATHS):
        return False
    content_type = headers.get("content-type", "").lower()
    if "json" in content_type:
        return False
    return model is not None or (route.is_known and content_type.startswith(_RAW_TYPES))


def looks_like_json(data: bytes) -> bool:
    """Whether a server could read this body as a JSON object, in whatever encoding, although we could not."""
    return data[:64].lstrip(_BEFORE_JSON).startswith(b"{")
