"""Reads the model's name from a form (``multipart/form-data``), in which recordings and pictures are sent. Pure.

The form goes on byte by byte as it came. As with JSON, the gateway must read the same model as the server: a form that
servers could read differently is refused.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from gpumesh.gateway.body_parsers.part_head import (
    CHARSETS,
    MAX_PART_HEAD_BYTES,
    form_error,
    read_header,
    read_part_head,
)
from gpumesh.gateway.http.errors import BadRequest

WINDOW = 1 << 20  # bytes that are searched in one step
MAX_PARTS = 1000
MAX_MODEL_BYTES = 4 << 10

_BOUNDARY = re.compile(rb"[^\s\"\\;,](?:[^\"\\\r\n]{0,68}[^\s\"\\;,])?")


@dataclass(frozen=True, slots=True)
class Form:
    """``model`` is the name in the form, ``None`` if it names none. The part with the name, with the line of its
    boundary, is ``body[start:end]``; both are 0 without one."""

    body: bytes
    boundary: bytes
    model: str | None = None
    start: int = 0
    end: int = 0

    def render_pieces(self, model: str) -> list[bytes | memoryview]:
        """The form with this model, in pieces. The part with the model comes first: ``backends/model_member.py`` looks
        for it there. Raises BadRequest if the name cannot stand in a form."""
        if any(ord(letter) < ord(" ") for letter in model):
            raise BadRequest("model has a character that no name has")
        first_part = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (
            self.boundary,
            model.encode(),
        )
        view = memoryview(self.body)
        before_first_part = 2 if self.body.startswith(b"\r\n") else 0
        return [first_part, view[before_first_part : self.start], view[self.end :]]


def read_boundary(headers: Mapping[str, str]) -> bytes | None:
    """The boundary between the parts of a form; ``None`` if the body is no form. Raises BadRequest for a form without a
    boundary."""
    content_type = headers.get("content-type")
    if content_type is None or not content_type.lower().lstrip().startswith("multipart/form-data"):
        return None
    _, parameters = read_header(content_type.encode("utf-8", "surrogateescape"))
    boundary = (parameters or {}).get(b"boundary", b"")
    if parameters is None or _BOUNDARY.fullmatch(boundary) is None:
        raise BadRequest("the form's Content-Type has no boundary that can be read")
    if parameters.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise BadRequest("the form's charset is not utf-8")
    return boundary


def scan_form(body: bytes, boundary: bytes) -> Generator[None, None, Form]:
    """Reads the form, and yields after each step. Raises BadRequest if servers could read the form differently."""
    delimiter = b"\r\n--" + boundary
    if not body.startswith((delimiter, delimiter[2:])):  # servers skip an empty line before the first part
        raise form_error("it does not begin with its boundary")
    form = Form(body, boundary)
    part_start = 2 if body.startswith(b"\r\n") else 0
    position = part_start + len(delimiter) - 2
    for _ in range(MAX_PARTS + 1):
        line_end = body[position : position + 2]
        if line_end == b"--":
            if len(body) - position > WINDOW or body[position + 2 :].strip():
                raise form_error("something follows after its end")
            return form
        if line_end != b"\r\n":
            raise form_error("a part does not begin with a line of the boundary")
        head_end = body.find(b"\r\n\r\n", position, position + MAX_PART_HEAD_BYTES)
        if head_end < 0:
            raise form_error("a part has no end of its head")
        is_model = _is_model_part(body[position + 2 : head_end])
        next_delimiter = yield from _find(body, delimiter, head_end + 2)
        if is_model:
            if form.end:
                raise BadRequest("the form has `model` twice")
            model = _read_model(body[head_end + 4 : max(next_delimiter, head_end + 4)][: MAX_MODEL_BYTES + 1])
            form = Form(body, boundary, model, part_start, next_delimiter + 2)
        part_start, position = next_delimiter + 2, next_delimiter + len(delimiter)
    raise form_error(f"it has more than {MAX_PARTS} parts")


def _find(body: bytes, delimiter: bytes, position: int) -> Generator[None, None, int]:
    """The index of the next delimiter. Raises BadRequest if there is none."""
    while position < len(body):
        index = body.find(delimiter, position, position + WINDOW + len(delimiter))
        yield
        if index >= 0:
            return index
        position += WINDOW
    raise form_error("it ends too early")


def _is_model_part(head: bytes) -> bool:
    """Whether a part with this head is the model's name. Raises BadRequest for a head that cannot be read."""
    part = read_part_head(head)
    is_model = part.name == b"model"
    if is_model and (part.is_file or part.is_encoded):
        raise BadRequest("model is required, as plain text")
    return is_model


def _read_model(value: bytes) -> str | None:
    """The model's name; ``None`` if it is empty. Raises BadRequest if it is no text, or too long."""
    if len(value) > MAX_MODEL_BYTES:
        raise BadRequest("model is too long")
    try:
        return value.decode() or None
    except UnicodeDecodeError as error:
        raise BadRequest("model is required, as plain text") from error
