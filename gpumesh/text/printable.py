"""Makes text from a remote machine safe to print: no terminal escapes, no control characters, no endless lines.

What a host sends is hostile until it is parsed: a GPU may be called ``\\x1b]0;…``. Code that turns remote bytes into a
name or a message calls ``printable`` at once, so that no caller of that code has to.
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
    """Returns ``text`` as one line of at most ``limit`` characters that is safe to print. Never raises.

    Each run of white space becomes one blank.
    """
    # Bounds the work on a hostile text. More than ``limit`` characters stay, because escapes and blanks are removed.
    text = text[: limit * 16]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    # A shortcut that almost every text of a server takes: a list of models has thousands of texts. A text with a blank
    # does not take it: the blank may stand at an end or beside another blank.
    is_safe_word = text.isascii() and text.isprintable() and " " not in text
    if is_safe_word and len(text) <= limit:
        return text
    if not _PRINTABLE_ASCII.fullmatch(text):
        text = "".join(map(_replace_invisible, _ESCAPES.sub("", text)))
    text = _BLANKS.sub(" ", text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _replace_invisible(character: str) -> str:
    """Returns a blank for white space of any kind, an empty text for controls, direction marks, surrogates and private
    use, and else the character."""
    category = unicodedata.category(character)  # Unicode's general category: Z is white space, C all that is removed
    if character in "\t\n\v\f\r" or category.startswith("Z"):
        return " "
    return "" if category.startswith("C") else character
