"""Encodes and decodes the lines of the control socket: each message is one JSON object on one line of limited length.

The server and both clients use this file. It imports json only, because ``status`` and shell completion must start
quickly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Bytes of one message. A prompt with images is some MB of base64; no gpumesh sends a longer line than this.
LINE_LIMIT = 1 << 26
UNKNOWN_MESSAGE = "not a message that this gpumesh knows"


def encode_line(kind: str, fields: Mapping[str, Any]) -> bytes:
    """Returns a message as one line, with its line feed. ``kind`` is the name of a class in ``messages``."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def decode_line(line: bytes) -> tuple[str, dict[str, Any]]:
    """Returns the kind of the message and its whole JSON object. Raises ``ValueError``, or ``RecursionError`` for JSON
    that is nested too deeply."""
    document = json.loads(line)
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str):
        raise unknown_message()
    return kind, document


def unknown_message() -> ValueError:
    """Returns the error for a line that is no message, or a message of a kind that this version does not know."""
    return ValueError(f"{UNKNOWN_MESSAGE}; is the running mesh of another version?")
