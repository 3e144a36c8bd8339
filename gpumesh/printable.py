"""What a remote machine says, made safe to print: no terminal escapes, no control characters, no endless lines.

Hosts are hostile until parsed (STYLE, habit 10): a GPU may be called ``\\x1b]0;…``. Whoever turns remote bytes into a
name or a message passes them through here first, so that nothing further up has to think of it.
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
_PLAIN = re.compile(r"[ -~]*")


def printable(said: str | bytes, limit: int = 300) -> str:
    """One line of at most ``limit`` characters; runs of white space become one blank. Never raises."""
    said = said[: limit * 16]
    # Nearly all that servers send is of this kind, and of a list of models there is much.
    if isinstance(said, str) and len(said) <= limit and said.isascii() and said.isprintable() and " " not in said:
        return said
    if isinstance(said, bytes):
        said = said.decode("utf-8", "replace")
    if not _PLAIN.fullmatch(said):
        said = "".join(map(_visible, _ESCAPES.sub("", said)))
    said = _BLANKS.sub(" ", said).strip()
    return said if len(said) <= limit else said[: limit - 1] + "…"


def _visible(character: str) -> str:
    """White space of any kind as a blank; controls, marks of direction, surrogates and private use as nothing."""
    kind = unicodedata.category(character)
    if character in "\t\n\v\f\r" or kind.startswith("Z"):
        return " "
    return "" if kind.startswith("C") else character
