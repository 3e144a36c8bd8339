'''Reads what was typed: a text between ``"""`` goes over several lines, as in Ollama; a line with ``/`` may be a
command. Pure.'''

from __future__ import annotations

import re

QUOTES = '"""'
# A command's name ends with a blank. `/etc/hosts` is the beginning of a message.
_COMMAND = re.compile(r"/([A-Za-z?]+)(?:\s+(.*))?", re.DOTALL)
_OPENED = re.compile(r'\s*(?:/set\s+system\s+)?"""(.*)', re.DOTALL)


def is_open(text: str) -> bool:
    """Whether the text has opened a quotation with ``\"\"\"`` and has not closed it yet."""
    match = _OPENED.match(text)
    return match is not None and not match[1].rstrip().endswith(QUOTES)


def unquote(text: str) -> str:
    """The text without the ``\"\"\"`` around it, and without white space around both."""
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip()
    return text


def split_command(text: str) -> tuple[str, str] | None:
    """The name of a command in lower case, without its ``/``, and the text after it; ``None`` for a message."""
    match = _COMMAND.fullmatch(text.strip())
    return None if match is None else (match[1].lower(), (match[2] or "").strip())
