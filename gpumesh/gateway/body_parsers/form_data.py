"""Reads the model's name from a form (``multipart/form-data``), in which recordings and pictures are sent. Pure.

The form goes on byte by byte as it came. As with JSON, the gateway must read the same model as the server: a form that
servers could read differently is refused.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from gpumesh.gateway.http.errors import BadRequest

WINDOW = 1 << 20  # bytes that are searched in one step
MAX_PARTS = 1000
MAX_PART_HEAD_BYTES = 8 << 10
MAX_MODEL_BYTES = 4 << 10

# One parameter of a header: its name, and its value, quoted or not. A last semicolon may have nothing after it.
_PARAMETER = re.compile(rb"""[ \t]*;[ \t]*(?:([^\s;,="]{1,70})=("(?:[^"\\\r\n]|\\.)*"|[^\s";,]*)|$)""")
_BOUNDARY = re.compile(rb"[^\s\"\\;,](?:[^\"\\\r\n]{0,68}[^\s\"\\;,])?")
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})  # with another one, a server could read another model


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
    _, parameters = _read_header(content_type.encode("utf-8", "surrogateescape"))
    boundary = (parameters or {}).get(b"boundary", b"")
    if parameters is None or _BOUNDARY.fullmatch(boundary) is None:
        raise BadRequest("the form's Content-Type has no boundary that can be read")
    if parameters.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise BadRequest("the form's charset is not utf-8")
    return boundary


def scan_form(body: bytes, boundary: bytes) -> Generator[None, None, Form]:
    """Reads the form, and yields after each step. Raises BadRequest if servers could read the form differently."""
    delimiter = b"\r\n--" + boundary
    if not body.startswith((delimiter, delimiter[2:])):  # servers skip an empty line before the first part
        raise _form_error("it does not begin with its boundary")
    form = Form(body, boundary)
    part_start = 2 if body.startswith(b"\r\n") else 0
    position = part_start + len(delimiter) - 2
    for _ in range(MAX_PARTS + 1):
        line_end = body[position : position + 2]
        if line_end == b"--":
            if len(body) - position > WINDOW or body[position + 2 :].strip():
                raise _form_error("something follows after its end")
            return form
        if line_end != b"\r\n":
            raise _form_error("a part does not begin with a line of the boundary")
        head_end = body.find(b"\r\n\r\n", position, position + MAX_PART_HEAD_BYTES)
        if head_end < 0:
            raise _form_error("a part has no end of its head")
        is_model = _is_model_part(body[position + 2 : head_end])
        next_delimiter = yield from _find(body, delimiter, head_end + 2)
        if is_model:
            if form.end:
                raise BadRequest("the form has `model` twice")
            model = _read_model(body[head_end + 4 : max(next_delimiter, head_end + 4)][: MAX_MODEL_BYTES + 1])
            form = Form(body, boundary, model, part_start, next_delimiter + 2)
        part_start, position = next_delimiter + 2, next_delimiter + len(delimiter)
    raise _form_error(f"it has more than {MAX_PARTS} parts")


def _find(body: bytes, delimiter: bytes, position: int) -> Generator[None, None, int]:
    """The index of the next delimiter. Raises BadRequest if there is none."""
    while position < len(body):
        index = body.find(delimiter, position, position + WINDOW + len(delimiter))
        yield
        if index >= 0:
            return index
        position += WINDOW
    raise _form_error("it ends too early")


def _is_model_part(head: bytes) -> bool:
    """Whether a part with this head is the model's name. Raises BadRequest for a head that cannot be read."""
    dispositions: list[bytes] = []
    is_encoded = False
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or b"\r" in line or b"\n" in line or name != name.strip():
            raise _form_error("a line in the head of a part cannot be read")
        if name.lower() == b"content-disposition":
            dispositions.append(value.strip())
        elif name.lower() == b"content-transfer-encoding":
            is_encoded |= value.strip().lower() not in (b"binary", b"8bit", b"7bit")
        elif name.lower() == b"content-type":
            charset = (_read_header(value)[1] or {}).get(b"charset", b"utf-8")
            is_encoded |= charset.lower() not in _CHARSETS
    kind, parameters = _read_header(dispositions[0]) if len(dispositions) == 1 else (b"", None)
    # ``name*`` is read by some servers only.
    if kind.lower() != b"form-data" or not parameters or b"name" not in parameters or b"name*" in parameters:
        raise _form_error("the name of a part cannot be read")
    is_model = parameters[b"name"] == b"model"
    is_file = b"filename" in parameters or b"filename*" in parameters
    if is_model and (is_file or is_encoded):
        raise BadRequest("model is required, as plain text")
    return is_model


def _read_header(value: bytes) -> tuple[bytes, dict[bytes, bytes] | None]:
    """The value of a header up to its first semicolon, and its parameters by their names in lower case, in any order.
    The parameters are ``None`` if servers could read them differently: one comes twice, or has a backslash that some
    servers take as a part of it, unless it is a file's name."""
    value = value.strip()
    kind = value.partition(b";")[0]
    parameters: dict[bytes, bytes] = {}
    position = len(kind)
    while position < len(value):
        match = _PARAMETER.match(value, position)
        if match is None:
            return kind, None
        position = match.end()
        if match[1] is None:
            continue
        name, text = match[1].lower(), match[2]
        has_backslash = text.startswith(b'"') and b"\\" in text
        is_harmless = name == b"filename" and not (b'\\"' in text and b"name" in text.lower())
        if name in parameters or (has_backslash and not is_harmless):
            return kind, None
        parameters[name] = text[1:-1] if text.startswith(b'"') else text
    return kind.strip(), parameters


def _read_model(value: bytes) -> str | None:
    """The model's name; ``None`` if it is empty. Raises BadRequest if it is no text, or too long."""
    if len(value) > MAX_MODEL_BYTES:
        raise BadRequest("model is too long")
    try:
        return value.decode() or None
    except UnicodeDecodeError as error:
        raise BadRequest("model is required, as plain text") from error


def _form_error(reason: str) -> BadRequest:
    return BadRequest(f"the request body is no form: {reason}")
