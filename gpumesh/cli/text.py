"""Text from elsewhere, made safe for a terminal, and figures as people write them. Pure; no rich."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from gpumesh.printable import printable

UNKNOWN = "–"  # noqa: RUF001  # a dash, as tables have it

# C0 and C1 controls and DEL, what terminals act on, and the marks that turn a line's order around unseen.
_ACTED_ON = dict.fromkeys(
    (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
)
_TEXT = {code: nothing for code, nothing in _ACTED_ON.items() if chr(code) not in "\t\n"}


# json escapes C0 itself. What stands between quotes only: newlines of an indented document are not in here.
_ESCAPED = {code: f"\\u{code:04x}" for code in _ACTED_ON if code >= 0x7F}


def clean_text(text: str) -> str:
    """Text of several lines without anything that a terminal would act on; a piece of a stream may be cleaned alone."""
    return text.translate(_TEXT).encode("utf-8", "replace").decode()


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that may be shown on a terminal: letters of all scripts as they are, controls and surrogates escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.translate(_ESCAPED).encode("ascii" if text.isascii() else "utf-8", "backslashreplace").decode()


def clean_line(text: str, limit: int = 1000) -> str:
    """One line of plain text."""
    return printable(text, limit)


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…"


def short_gpu(name: str) -> str:
    """``NVIDIA GeForce RTX 4090`` -> ``RTX 4090``: what tells one card from another."""
    words = [word for word in name.split(" ") if word.lower() not in ("nvidia", "geforce", "tesla", "quadro")]
    return " ".join(words) or name


def format_gib(mib: int | None) -> str:
    """``5.5``: GiB with one decimal below 100."""
    if mib is None:
        return "?"
    value = mib / 1024
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], most: float) -> str:
    """One sign for each value, from 0 (the lowest) to ``most`` (the highest); a blank where nothing was known."""
    top = len(_LEVELS) - 1
    return "".join(
        " " if value is None else _LEVELS[min(max(math.ceil(value / most * top), 0), top)] for value in values
    )


def format_milliseconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value >= 10_000:
        return f"{value / 1000:.0f} s"
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def format_duration(seconds: float) -> str:
    """``45s``, ``4m``, ``3h``, ``2d``: the largest unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def format_time_left(until: datetime | None, now: datetime) -> str | None:
    """How long a model stays in memory. A century means for ever: Ollama's ``keep_alive: -1``."""
    if until is None:
        return None
    seconds = (until - now).total_seconds()
    return "∞" if seconds > 86400 * 365 else format_duration(seconds)
