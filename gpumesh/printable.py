"""Makes text from a remote machine safe to print: no terminal escapes, no control characters, no endless lines.

What a host sends is hostile until it is parsed: a GPU may be called ``\\x1b]0;…``. Code that turns remote bytes into a
name or a message calls ``printable`` first, so that no code above has to.
"""

from __future__ import annotations

import re
import unicodedata

# ECMA-48: CSI sequences, strings (OSC, DCS, APC, PM, SOS) up to their terminator, and two-character escapes.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,16}[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]{0,4096}(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]{0,16}[0-~]?"
)
_BLANKS = re.compile(r"\s+")
_PRINTABLE_ASCII = re.compile(r"[ -~]*")


def printable(text: str | bytes, limit: int = 300) -> str:
    """One line of at most ``limit`` characters; runs of white space become one blank. Never raises."""
    text = text[: limit * 16]  # bounds the work on a hostile text; the rest is for what is removed below
    # A shortcut that almost every text of a server takes: a list of models has thousands of texts.
    if isinstance(text, str) and len(text) <= limit and text.isascii() and text.isprintable() and " " not in text:
        return text
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not _PRINTABLE_ASCII.fullmatch(text):
        text = "".join(map(_replace_invisible, _ESCAPES.sub("", text)))
    text = _BLANKS.sub(" ", text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _replace_invisible(character: str) -> str:
    """White space of any kind becomes a blank. Controls, direction marks, surrogates and private use are removed."""
    category = unicodedata.category(character)
    if character in "\t\n\v\f\r" or category.startswith("Z"):
        return " "
    return "" if category.startswith("C") else character
