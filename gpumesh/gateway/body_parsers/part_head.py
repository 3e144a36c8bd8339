"""Reads the head of one part of a form (``multipart/form-data``). Pure.

A head that two servers could read differently is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from gpumesh.gateway.http.errors import BadRequest

MAX_PART_HEAD_BYTES = 8 << 10
# With another charset, a server could read another text.
CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})
# One parameter of a header: its name, and its value, quoted or not. A last semicolon may have nothing after it.
_PARAMETER = re.compile(rb"""[ \t]*;[ \t]*(?:([^\s;,="]{1,70})=("(?:[^"\\\r\n]|\\.)*"|[^\s";,]*)|$)""")


@dataclass(frozen=True, slots=True)
class PartHead:
    """The head of a part. ``is_file``: it names a file. ``file_name``: that name; ``None`` if there is none.
    ``is_encoded``: the content is not plain text in UTF-8."""

    name: bytes
    is_file: bool
    file_name: bytes | None
    is_encoded: bool


def read_part_head(head: bytes) -> PartHead:
    """Reads the head of a part, without its last line end. Raises BadRequest for a head that cannot be read."""
    dispositions: list[bytes] = []
    is_encoded = False
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or b"\r" in line or b"\n" in line or name != name.strip():
            raise form_error("a line in the head of a part cannot be read")
        if name.lower() == b"content-disposition":
            dispositions.append(value.strip())
        elif name.lower() == b"content-transfer-encoding":
            is_encoded |= value.strip().lower() not in (b"binary", b"8bit", b"7bit")
        elif name.lower() == b"content-type":
            charset = (read_header(value)[1] or {}).get(b"charset", b"utf-8")
            is_encoded |= charset.lower() not in CHARSETS
    kind, parameters = read_header(dispositions[0]) if len(dispositions) == 1 else (b"", None)
    # ``name*`` is read by some servers only.
    if kind.lower() != b"form-data" or not parameters or b"name" not in parameters or b"name*" in parameters:
        raise form_error("the name of a part cannot be read")
    file_name = parameters.get(b"filename")
    if file_name is None and b"filename*" in parameters:  # RFC 5987: utf-8'en'%C3%A4.wav
        file_name = unquote_to_bytes(parameters[b"filename*"].rpartition(b"'")[2])
    return PartHead(parameters[b"name"], file_name is not None, file_name, is_encoded)


def read_header(value: bytes) -> tuple[bytes, dict[bytes, bytes] | None]:
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


def form_error(reason: str) -> BadRequest:
    """The error for a body that is no form."""
    return BadRequest(f"the request body is no form: {reason}")
