"""Makes text from hosts, clients and files safe for a terminal: whole texts, single lines, and JSON. Pure; no rich."""

from __future__ import annotations

import json
from typing import Any

from gpumesh.text.printable import printable

# C0 and C1 controls and DEL, which terminals act on, and the marks that change the direction of a line unseen.
_UNSAFE = dict.fromkeys(
    (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
)
_UNSAFE_IN_TEXT = {code: None for code in _UNSAFE if chr(code) not in "\t\n"}

# json itself escapes C0 in strings. So C0 is not escaped here: the newlines of an indented document must stay.
_UNSAFE_IN_JSON = {code: f"\\u{code:04x}" for code in _UNSAFE if code >= 0x7F}
_UNSAFE_IN_JSON_LINE = {**_UNSAFE_IN_JSON, **{code: None for code in range(0x20) if chr(code) != "\t"}}


def clean_text(text: str) -> str:
    """The text, of one or several lines, without anything that a terminal acts on. The pieces of a stream may be
    cleaned one by one."""
    return text.translate(_UNSAFE_IN_TEXT).encode("utf-8", "replace").decode()


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON that is safe on a terminal: controls and surrogates are escaped, letters of all scripts are
    not."""
    text = json.dumps(value, ensure_ascii=False, indent=indent).translate(_UNSAFE_IN_JSON)
    return text.encode("utf-8", "backslashreplace").decode()  # UTF-8 cannot hold a lone surrogate


def safe_json_line(line: str) -> str:
    """A line that is JSON already, as ``json_text`` would write it: only what a terminal acts on is changed."""
    return line.translate(_UNSAFE_IN_JSON_LINE)


def clean_line(text: str, limit: int = 1000) -> str:
    """One line of plain text of at most ``limit`` characters."""
    return printable(text, limit)
