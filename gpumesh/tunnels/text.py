"""What a host sent, made safe to print: hostile until then (STYLE, habit 10)."""

from __future__ import annotations


def printable(raw: str | bytes, limit: int = 200) -> str:
    """One line of at most ``limit`` characters, without control characters or anything that steers a terminal."""
    text = raw[: 4 * limit].decode("utf-8", "replace") if isinstance(raw, bytes) else raw[: 4 * limit]
    cleaned = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(cleaned.split())[:limit]
