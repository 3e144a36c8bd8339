"""Reads the images of a message: bytes, a path, or base64 text."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TypeAlias

Image: TypeAlias = bytes | str | os.PathLike[str]
"""An image as a program has it: its bytes, the path of a file, or base64 text (with or without ``data:…;base64,``)."""

_MIN_BASE64 = 32  # characters; a shorter text without a dot or a slash is a file's name, and no image is so small


def encode_image(image: object) -> str:
    """The image as base64 text. Raises TypeError for what is no image, ValueError for a text that is neither base64 nor
    the path of a file, and OSError if the file cannot be read."""
    if isinstance(image, bytes | bytearray | memoryview):
        if not image:
            raise ValueError("an image has no bytes")
        return base64.b64encode(image).decode()
    if isinstance(image, os.PathLike):
        return base64.b64encode(Path(image).read_bytes()).decode()
    if isinstance(image, str):
        return _read_text(image)
    raise TypeError(f"an image is bytes, a path or base64 text, not {type(image).__name__}")


def _read_text(text: str) -> str:
    """The base64 of an image that is given as base64, as a data: URL or as a path. Raises ValueError."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("an image with data: must be base64: data:image/png;base64,…")
    joined = "".join(text.split())  # base64 may have line breaks
    try:
        if len(joined) >= _MIN_BASE64:
            base64.b64decode(joined, validate=True)
            return joined
    except binascii.Error:
        pass  # then it is a path
    try:
        return base64.b64encode(Path(text).read_bytes()).decode()
    except (OSError, ValueError) as error:
        name = text if len(text) <= 100 else f"{text[:100]}…"
        raise ValueError(f"the image {name!r} is neither base64 text nor a file that can be read") from error


def media_type(encoded: str) -> str:
    """The media type of an image in base64, by its first bytes. PNG if they are not known."""
    for start, name in (("/9j/", "jpeg"), ("R0lGOD", "gif"), ("UklGR", "webp")):
        if encoded.startswith(start):
            return f"image/{name}"
    return "image/png"
