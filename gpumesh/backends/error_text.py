"""The message of a server's error response, in any of the known shapes, made safe to print."""

from __future__ import annotations

import re
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.text.printable import printable

ERROR_BYTES = 1 << 20  # only so much of an error response is read
TITLE_BYTES = 64 << 10  # a web page's title is searched for only in so many of its first bytes
MAX_DEPTH = 4  # objects that lie inside of more than so many objects and lists are not searched for a message
_TITLE = re.compile(rb"<title[^>]{0,200}>(?P<title>[^<]{1,300})", re.IGNORECASE)


def error_text(status: int, body: bytes) -> str:
    """The message of an error response, safe to print, in one line. Understands the JSON of Ollama, OpenAI, Anthropic
    and FastAPI, a web page and plain text. A response without a message gives its status."""
    message = _find_message(safe_json.parse(body[:ERROR_BYTES]))
    if message is None and not body.strip():
        return f"HTTP {status} without a word"
    if message is None and is_web_page(body):
        return f"HTTP {status} and {describe_web_page(body)}"
    return printable(message if message is not None else body) or f"HTTP {status}"


def is_web_page(body: bytes) -> bool:
    """Whether the body begins as HTML or XML: a proxy or another program sent it, not an inference server."""
    return body[:512].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml"))


def describe_web_page(body: bytes) -> str:
    """Describes a web page by its title, if it has one: ``a web page, "Open WebUI"``."""
    match = _TITLE.search(body[:TITLE_BYTES])
    if match is None:
        return "a web page"
    return f'a web page, "{printable(match["title"], 60)}"'


def find_error_message(document: dict[str, Any]) -> str | None:
    """The message of an error in an answer with status 200, or in a frame of a stream, safe to print; ``None`` if the
    document reports no error."""
    if document.get("error") in (None, "", {}, False):
        return None
    return describe_error(document)


def describe_error(value: Any) -> str:
    """The message in what is an error, safe to print."""
    return printable(_find_message(value) or "") or "an error without words"


# Members that only an answer has. An answer may have the member ``error`` as well.
_ANSWER_MEMBERS = ("choices", "response", "content", "output")


def find_reported_error(body: bytes) -> str | None:
    """The message of an error that a server reports with the status of a success, as some routers do; ``None`` if the
    body is an answer, or no JSON object of usual length."""
    if len(body) > ERROR_BYTES or b'"error"' not in body:
        return None
    document = safe_json.parse_object(body)
    if document is None or any(document.get(member) is not None for member in _ANSWER_MEMBERS):
        return None
    if document.get("object") == "error":  # vLLM's errors had this form
        return describe_error(document)
    is_ollama_chat = isinstance(document.get("message"), dict)  # an answer; an error's ``message`` is a text
    return None if is_ollama_chat else find_error_message(document)


def _find_message(document: Any, depth: int = 0) -> str | None:
    """The first text that is not blank, under the keys that servers use for an error message; ``None`` if there is
    none. Only the first entry of a list is searched. ``depth``: how many objects and lists are around ``document``."""
    if isinstance(document, str):
        return document if document.strip() else None
    if depth > MAX_DEPTH:
        return None
    if isinstance(document, list):
        return _find_message(document[0], depth + 1) if document else None
    if not isinstance(document, dict):
        return None
    for key in ("error", "message", "detail", "msg", "type"):
        message = _find_message(document.get(key), depth + 1)
        if message is not None:
            return message
    return None


def printable_label(value: Any) -> str | None:
    """A server's label, made safe to print; ``None`` if it is not a text, or if no printable character is left."""
    label = safe_json.as_text(value)
    return None if label is None else printable(label, 100) or None
